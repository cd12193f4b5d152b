"""What could be traced and saved, but not loaded again: weights that do not fit the model's own configuration."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from torch import nn

from ppcl_fx.errors import PpclError

Shapes = dict[str, tuple[int, ...]]


def check_loadable(model: nn.Module) -> None:
    """Refuse a model of diffusers whose weights are not those that its class has by its configuration.

    A model that diffusers does not know, or cannot build without weights, is let through.

    Raises:
        PpclError: something was put into the model or taken from it; the line says what undoes it.
    """
    wanted = _by_configuration(model)
    if wanted is None:
        return
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    odd = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    if odd:
        raise PpclError(
            f"the transformer {_difference(odd[0], held, wanted)} its own configuration, so a student of it could be "
            f"saved and not loaded; {_undo(model)}"
        )


def _by_configuration(model: nn.Module) -> Shapes | None:
    diffusers = sys.modules.get("diffusers")
    kind, config = type(model), getattr(model, "config", None)
    if diffusers is None or config is None or getattr(diffusers, kind.__name__, None) is not kind:
        return None
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    return _shapes(kind, json.dumps(plain, sort_keys=True, default=str))


@functools.lru_cache(maxsize=8)
def _shapes(kind: type[Any], config: str) -> Shapes | None:
    from ppcl_fx.tracing.meta_model import skeleton

    try:
        built = skeleton(kind, json.loads(config))
    except PpclError:
        return None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _difference(name: str, held: Shapes, wanted: Shapes) -> str:
    if name not in wanted:
        return f"has {name!r}, which it does not have by"
    if name not in held:
        return f"lacks {name!r}, which it has by"
    return f"has {name!r} with shape {list(held[name])}, and not {list(wanted[name])} as by"


def _undo(model: nn.Module) -> str:
    """Say what takes out of a model what the libraries' own calls put into it."""
    modules = list(model.modules())
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in modules):
        return (
            "a LoRA is in it: call pipe.unload_lora_weights() (transformer.unload_lora() without a pipeline); what "
            "pipe.fuse_lora() fused stays in the weights"
        )
    fused = [module for module in modules if getattr(module, "fused_projections", False)]
    if fused and all(hasattr(module, "unfuse_projections") for module in fused):
        return "query, key and value are fused: call transformer.unfuse_qkv_projections()"
    if fused:
        # diffusers' older attention keeps the fused layers when it is told to unfuse them.
        return "query, key and value are fused: load the model again, without fuse_qkv_projections()"
    processors: dict[str, Any] = getattr(model, "attn_processors", {})
    if any(isinstance(one, nn.Module) and any(True for _ in one.parameters()) for one in processors.values()):
        return "its attention processors have weights: call pipe.unload_ip_adapter(), or set_attn_processor"
    return "undo what changed it, or load the model again"
