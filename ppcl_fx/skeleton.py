"""A model without its weights: parameters on the meta device, everything else real, and the weights still on disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_fx.errors import PpclError
from ppcl_fx.fingerprint import fingerprint
from ppcl_fx.shards import Shards


@dataclass(frozen=True)
class Checkpoint:
    """A transformer that is read piece by piece.

    Attributes:
        model: the transformer; its parameters are on the meta device, in the dtypes that they are to be used in.
            Buffers and plain tensors are real: no file holds most of them.
        shards: its weights.
    """

    model: nn.Module
    shards: Shards

    @functools.cached_property
    def fingerprint(self) -> str:
        """What `ppcl_fx.fingerprint` says of the model with its weights: a few values of each tensor are read."""
        try:
            return fingerprint(self.model, self.shards.tensor)
        finally:
            self.shards.close()

    def used_in(self, dtype: torch.dtype) -> Checkpoint:
        """Return the same checkpoint with its weights used in another dtype."""
        if dtype == self.dtype:
            return self
        config: Mapping[str, Any] = self.model.config  # type: ignore[assignment]
        return Checkpoint(skeleton(type(self.model), config, dtype), self.shards)

    def known_as(self, fingerprint: str) -> Checkpoint | None:
        """Return the checkpoint in the dtype in which the model has this fingerprint; None where it has in none."""
        for dtype in dict.fromkeys((self.dtype, torch.float32, torch.bfloat16, torch.float16)):
            one = self.used_in(dtype)
            if one.fingerprint == fingerprint:
                return one
        return None

    @functools.cached_property
    def _wanted(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.model.state_dict().items()}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the state dict in the model's dtype: memory-mapped where it is stored so."""
        return self.shards.tensor(name).to(self._wanted[name])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point parameters."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def skeleton(kind: type[Any], config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a diffusers model without weights, in evaluation mode, with the dtypes that `from_pretrained` gives.

    Args:
        kind: the class.
        config: what its ``config.json`` holds.
        dtype: of the parameters, but for those that the class keeps in float32.

    Raises:
        PpclError: the class refuses the configuration.
    """
    try:
        with _weightless(dtype):
            model: nn.Module = kind.from_config(dict(config))
    except (TypeError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PpclError(f"{kind.__name__} refuses this configuration ({reason}); mend config.json") from error
    kept = tuple(getattr(kind, "_keep_in_fp32_modules", None) or ())
    if not kept:
        return nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns of what is no matter here
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if set(kept) & set(name.split(".")) else dtype
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)
    return model.eval()


@contextmanager
def _weightless(dtype: torch.dtype) -> Iterator[None]:
    """Send every parameter to the meta device as its module gets it: the memory is never written, so it costs none."""
    register = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            # Nothing that an initialiser does to a meta tensor takes time.
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    before = torch.get_default_dtype()
    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        if dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)
        nn.Module.register_parameter = register  # type: ignore[method-assign]
