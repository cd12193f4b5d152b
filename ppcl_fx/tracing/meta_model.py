"""A model without its weights: parameters on the meta device, everything else real, and the weights still on disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_fx.errors import foreign
from ppcl_fx.io.build_bounds import Room, on_register
from ppcl_fx.io.configurations import check_config
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.io.shards import Shards, loaded_dtype
from ppcl_fx.ir.dtypes import kept_in_float32, main_dtype, set_dtypes


@dataclass(frozen=True)
class Checkpoint:
    """A transformer that is read piece by piece from its shards.

    The model's parameters are on the meta device, in the dtypes that they are to be used in. Its buffers and plain
    tensors are real: no file holds most of them.
    """

    model: nn.Module
    shards: Shards

    @functools.cached_property
    def fingerprint(self) -> str:
        """What `ppcl_fx.io.fingerprint` says of the model with its weights: a few values of each tensor are read."""
        try:
            return fingerprint(self.model, self.shards.tensor)
        finally:
            self.shards.close()

    def known_as(self, fingerprint: str) -> Checkpoint | None:
        """Return the checkpoint in the dtype in which the model has this fingerprint; None where it has in none."""
        kind: Any = type(self.model)
        config: Any = self.model.config
        for dtype in dict.fromkeys((self.dtype, torch.float32, torch.bfloat16, torch.float16)):
            one = self if dtype == self.dtype else Checkpoint(skeleton(kind, config, dtype), self.shards)
            if one.fingerprint == fingerprint:
                return one
        return None

    @functools.cached_property
    def _wanted(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.model.state_dict().items()}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the state dict in the model's dtype: memory-mapped where it is stored so."""
        return self.shards.checked(name).to(self._wanted[name])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model answers: of the parameters that its class does not keep in float32."""
        return main_dtype(self.model)


def skeleton(
    kind: type[Any],
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    room: Room | None = None,
    where: str = "",
) -> nn.Module:
    """Build a diffusers model without weights, in evaluation mode, with the dtypes that `from_pretrained` gives.

    `room` bounds how large it may become, where the configuration is from outside; `where` names its file in messages.

    Raises:
        PpclError: the class refuses the configuration, or there is no room for what it asks for.
    """
    where = where or f"the configuration of {kind.__name__}"
    check_config(kind, config, where)
    refused = foreign(f"{where}: {kind.__name__} refuses this configuration", "mend config.json")
    with refused, room.kept(where) if room is not None else nullcontext(), _weightless(dtype):
        model: nn.Module = kind.from_config(dict(config))
    # Buffers that no file holds stay as the class made them.
    floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    kept = kept_in_float32(kind)
    set_dtypes(model, {name: loaded_dtype(name, dtype, kept) for name in floating})
    return model.eval()


@contextmanager
def _weightless(dtype: torch.dtype) -> Iterator[None]:
    """Send every parameter to the meta device as its module gets it: the memory is never written, so it costs none."""
    before = torch.get_default_dtype()
    try:
        if dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        with on_register(_emptied):
            yield
    finally:
        torch.set_default_dtype(before)


def _emptied(param: nn.Parameter) -> nn.Parameter:
    if param.device.type == "meta":
        return param
    # Nothing that an initialiser does to a meta tensor takes time.
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
