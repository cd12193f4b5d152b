"""What holds a model, so that a trace would not see all that it computes: hooks, wrappers, weights in other forms; and
what could be traced and saved, but not loaded again: weights that do not fit the model's own configuration.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ppcl_fx.errors import PpclError
from ppcl_fx.tracing.meta_model import skeleton

WRAPPERS = ("torch._dynamo", "torch.nn.parallel", "torch.distributed", "torch.jit")
"""Where classes live that torch puts around a model, or in the place of its class."""

AGAIN = "load the model again, and trace it before that"


def check_free(model: nn.Module) -> None:
    """Refuse a model that computes, or keeps its weights, otherwise than its code and its parameters say."""
    cached = bool(getattr(model, "is_cache_enabled", False))
    for path, module in model.named_modules():
        for fault in _faults(module, cached):
            raise PpclError(f"module {path!r} {fault}" if path else f"the model {fault}")
    for fault in _odd_weights(model):
        raise PpclError(f"the model {fault}")


def _faults(module: nn.Module, cached: bool) -> Iterator[str]:
    own, kind = vars(module), type(module)
    around = next((base for base in kind.__mro__ if base.__module__.startswith(WRAPPERS)), None)
    inner = [name for name, _ in module.named_children()]
    if around is kind and len(inner) == 1:
        yield f"is wrapped by torch ({kind.__name__}); give the module that is inside, its attribute {inner[0]!r}"
    elif around is not None:
        yield f"is wrapped by torch ({around.__name__}); {AGAIN}"
    elif getattr(module, "_compiled_call_impl", None) is not None:
        yield f"is compiled in its place by compile(), which a trace cannot look into; {AGAIN}"
    if "_hf_hook" in own:
        yield (
            f"is held by accelerate ({type(own['_hf_hook']).__name__}: offloading or a device map); take it off: "
            "pipe.remove_all_hooks(), or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    for name in getattr(own.get("_diffusers_hook"), "hooks", {}):
        registry = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)"
        off = "model.disable_cache()" if cached else f"{registry}.remove_hook({name!r}, recurse=True)"
        yield f"is held by diffusers' hook {name!r} (a cache, offloading, casting ...); take it off: {off}"
    for found in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        name = getattr(found, "__qualname__", type(found).__name__)
        yield (
            f"has forward hooks ({name}), which a trace cannot see; remove them before tracing: handle.remove(), or "
            "torch.nn.utils.remove_weight_norm and the like for what torch hooked in"
        )
    forward = own.get("forward")
    # Hooks that were taken off leave the class's own method behind.
    if forward is not None and getattr(forward, "__func__", None) is not kind.forward:
        name = getattr(forward, "__qualname__", type(forward).__name__)
        yield f"has a forward put in the place of its class's ({name}), which a trace would not look into; {AGAIN}"
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        yield (
            f"computes its {name} by a parametrization; make it plain: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        )


def _odd_weights(model: nn.Module) -> Iterator[str]:
    """Say which weights are not plain tensors of floating-point numbers that can be computed with."""
    config = getattr(model, "config", None)
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
        name = getattr(method, "value", method) or type(found).__name__
        yield f"is quantised ({name}), and only plain weights can be pruned; load it unquantised"
    advice = "only plain floating-point weights can be pruned; load the model unquantised and in one piece"
    for name, parameter in model.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            yield f"keeps {name!r} as {type(parameter).__name__}, and {advice}"
        # One byte a number: float8 is for keeping, not for computing.
        if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.element_size() == 1:
            yield f"keeps {name!r} in {str(parameter.dtype).removeprefix('torch.')}, and {advice}"
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            yield f"keeps {name!r} as {type(value).__name__}, and {advice}"


def check_loadable(model: nn.Module) -> None:
    """Refuse a model of diffusers whose weights are not those that its class has by its configuration.

    A model that diffusers does not know, or cannot build without weights, is let through.
    """
    diffusers, kind, config = sys.modules.get("diffusers"), type(model), getattr(model, "config", None)
    if diffusers is None or config is None or getattr(diffusers, kind.__name__, None) is not kind:
        return
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    wanted = _shapes(kind, json.dumps(plain, sort_keys=True, default=str))
    if wanted is None:
        return
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    odd = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    if odd:
        name = odd[0]
        if name not in wanted:
            how = f"has {name!r}, which it does not have by"
        elif name not in held:
            how = f"lacks {name!r}, which it has by"
        else:
            how = f"has {name!r} with shape {list(held[name])}, and not {list(wanted[name])} as by"
        raise PpclError(
            f"the transformer {how} its own configuration, so a student of it could be saved and not loaded; "
            f"{_undo(model)}"
        )


@functools.lru_cache(maxsize=8)
def _shapes(kind: type[Any], config: str) -> dict[str, tuple[int, ...]] | None:
    try:
        built = skeleton(kind, json.loads(config))
    except PpclError:
        return None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


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
