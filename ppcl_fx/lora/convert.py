"""Other trainers' key layouts, read by diffusers' own converters, found through the pipelines of the model's class."""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers and PEFT raise, without a plan, where names, shapes or settings are not what they expect."""


def line(error: Exception) -> str:
    """Return what a library's error says, in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]}..."


@dataclass(frozen=True)
class Converted:
    """What diffusers makes of a LoRA's tensors.

    Attributes:
        by: the class of diffusers that converted it.
        tensors: by their new names, the component before them.
        alphas: what diffusers gives beside them.
        fault: what the converter said where it could not, in brackets; nothing is converted then.
    """

    by: str
    tensors: dict[str, torch.Tensor]
    alphas: dict[str, Any]
    fault: str = ""


@functools.cache
def loader_of(transformer: str) -> Any:
    """Return the LoRA mixin of a pipeline of diffusers that takes a transformer of this class, or ``None``.

    Pipelines are imported one by one, those first whose names resemble the transformer's.
    """
    from diffusers import pipelines
    from diffusers.loaders.lora_base import LoraBaseMixin

    def unlike(name: str) -> float:
        return -difflib.SequenceMatcher(None, name.lower(), transformer.lower()).ratio()

    for name in sorted((name for name in dir(pipelines) if name.endswith("Pipeline")), key=unlike):
        pipeline = getattr(pipelines, name)
        if not (inspect.isclass(pipeline) and issubclass(pipeline, LoraBaseMixin)):
            continue
        parameters = inspect.signature(pipeline.__init__).parameters
        component = parameters.get(getattr(pipeline, "transformer_name", ""))
        if component is not None and transformer in _classes(component.annotation):
            own = (base for base in pipeline.__mro__ if "lora_state_dict" in vars(base))
            return next(own)
    return None


def _classes(annotation: Any) -> set[str]:
    """The names of the classes in an annotation: a class, a union, or the text of one."""
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")}
    return {getattr(kind, "__name__", "") for kind in typing.get_args(annotation) or (annotation,)}


def converted(transformer: str, tensors: Mapping[str, torch.Tensor]) -> Converted | None:
    """Read a LoRA as ``pipe.load_lora_weights`` of the transformer's pipeline does.

    Args:
        transformer: the name of the transformer's class.
        tensors: the LoRA's tensors by name.

    Returns:
        What diffusers makes of them; ``None`` where it has no LoRA loader for this class.
    """
    loader = loader_of(transformer)
    if loader is None:
        return None
    options = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(loader.lora_state_dict).parameters:
        options["return_alphas"] = True
    try:
        found = loader.lora_state_dict(dict(tensors), **options)
    except FAULTS as error:
        return Converted(loader.__name__, {}, {}, f" ({line(error)})")
    return Converted(loader.__name__, found[0], (found[1] if len(found) == 3 else None) or {})
