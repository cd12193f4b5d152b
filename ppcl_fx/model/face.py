"""What pipelines ask of their transformer beside calling it, answered as the teacher's class does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.tracing.meta_model import skeleton

if TYPE_CHECKING:

    class _DiffusersModel(nn.Module):
        """Typed in part only."""

else:
    from diffusers import ModelMixin as _DiffusersModel


class Uncached:
    """A transformer without caches of its own; pipelines name the guidance branch of a call all the same."""

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Do nothing: the branch, and where the loop stands, are told to caches that this model does not have."""
        del name, where
        yield


class PipelineFace(Uncached, _DiffusersModel):
    """A model of diffusers by its class that computes in its own way and answers like the class it was traced from.

    What the model itself does not have (``model.in_channels``, ``model.rope``, ``model.build_attention_mask(...)``) is
    asked of its teacher's class, built anew from the configuration over the weights that are there. That copy is for
    reading. A change to it (a hook on a block, a cache, fused projections) would do nothing, so it is refused.
    """

    KIND = "a pluggable model"
    """What the model is called in messages."""

    # ---- what cannot be right ----------------------------------------------------------------------------------

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the blocks lie open in the graph."""
        self._refuse("no blocks to compile: they are parts of one graph; compile it whole: torch.compile(model)")

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: weights that change their dtype behind the graph's back."""
        self._refuse("no layerwise casting: its graph was traced with one dtype; use to(torch.bfloat16)")

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: there are no weights to move."""
        self._refuse("no weights of its own to offload; leave it out")

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a LoRA changes weights of the teacher, by the teacher's block numbers."""
        self._refuse("no place for a LoRA; load it into the pluggable model, fuse it there, and save or export that")

    def _refuse(self, what: str) -> NoReturn:
        raise PpclError(f"{self.KIND} has {what}")

    # ---- the teacher's class -----------------------------------------------------------------------------------

    def _class_config(self) -> Mapping[str, Any] | None:
        """Return the configuration that the teacher's class is built from; None as long as the model is not made."""
        raise NotImplementedError

    def _class_weights(self) -> Mapping[str, torch.Tensor]:
        """Return parameters and buffers by the teacher's names."""
        return {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            made = None if name.startswith("__") else self._class_copy()
            if made is None:
                raise
        value = getattr(made.model, name)
        if inspect.ismethod(value) and value.__self__ is made.model:
            return self._watched(value)
        made.shown |= isinstance(value, nn.Module)
        return value

    def _class_copy(self) -> _Made | None:
        """Return the teacher's class, built once; None where it is no class of diffusers, or refuses to be built."""
        made: _Made | None = self.__dict__.get("_made")
        config = self._class_config() if made is None else None
        if config is None:
            return made
        try:
            model = skeleton(diffusers_class(str(config.get("_class_name"))), config, self.dtype)
        except PpclError:
            return None  # whoever asks by `hasattr` gets an answer, whatever the class is
        weights = self._class_weights()
        for path, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        here = tensor if tensor.is_meta else tensor.to(self.device)
                        held[name] = weights.get(f"{path}.{name}" if path else name, here)
        made = self.__dict__["_made"] = _Made(model)
        return made

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the teacher's class that may compute something, and may not change the model."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._check_class(f"{method.__name__}() changes", shown=True)
            return result

        return call

    def _check_class(self, what: str = "somebody changed", *, shown: bool = False) -> None:
        """Raise where a copy of the teacher's class that was handed out was changed; the copy is thrown away.

        Args:
            what: who changed it, for the message.
            shown: look also where no module was handed out.

        Raises:
            PpclError: see above.
        """
        made = None if torch.compiler.is_compiling() else self.__dict__.get("_made")
        changed = made.changed() if made is not None and (shown or made.shown) else None
        if changed is not None:
            self._forget_class()
            raise PpclError(
                f"{what} {changed} of the transformer's class, and {self.KIND} does not compute by that: it would do "
                "nothing, and was taken back; leave it out"
            )

    def _forget_class(self) -> None:
        """Build the class anew when it is asked for something next."""
        self.__dict__.pop("_made", None)


class _Made:
    """The teacher's class as it was built, and how it was then.

    Args:
        model: the model.

    Attributes:
        shown: whether a module of it was handed out, so that somebody may have changed it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shown = False
        self._before = _structure(model)

    def changed(self) -> str | None:
        """Return the name of what is not as it was, or None."""
        now = _structure(self.model)
        both = [*now, *(key for key in self._before if key not in now)]
        odd = next((key for key in both if not _same(now.get(key), self._before.get(key))), None)
        return None if odd is None else repr(".".join(odd).lstrip("."))


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (bool, int, float, str)) and type(one) is type(other) and one == other)


def _structure(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return what a model computes by: modules, parameters, functions, hooks, settings; not the tensors it keeps."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters"):
                found |= {(path, key): item for key, item in value.items()}
            elif name.endswith("_hooks"):
                found |= {(path, f"{name}[{key}]"): item for key, item in value.items()}
            elif callable(value) or isinstance(value, (bool, int, float, str)):
                found[path, name] = value
    return found
