"""What holds a model, so that a trace would not see all that it computes: hooks, wrappers, weights in other forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ppcl_fx.errors import PpclError

WRAPPERS = ("torch._dynamo", "torch.nn.parallel", "torch.distributed", "torch.jit")
"""Where classes live that torch puts around a model, or in the place of its class."""

AGAIN = "load the model again, and trace it before that"


def check_free(model: nn.Module) -> None:
    """Refuse a model that computes, or keeps its weights, otherwise than its code and its parameters say.

    Raises:
        PpclError: something holds it; the line says what, where, and how to take it off.
    """
    cached = bool(getattr(model, "is_cache_enabled", False))
    for path, module in model.named_modules():
        for fault in (_wrapped(module), _hooked(module, cached), _replaced(module), _parametrised(module)):
            if fault is not None:
                where = f"module {path!r}" if path else "the model"
                raise PpclError(f"{where} {fault}")
    for fault in (_quantised(model), *_odd_weights(model)):
        if fault is not None:
            raise PpclError(f"the model {fault}")


def _wrapped(module: nn.Module) -> str | None:
    kind = next((base for base in type(module).__mro__ if base.__module__.startswith(WRAPPERS)), None)
    if kind is None:
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        return f"is compiled in its place by compile(), which a trace cannot look into; {AGAIN}" if compiled else None
    inner = [name for name, _ in module.named_children()]
    if kind is type(module) and len(inner) == 1:
        return f"is wrapped by torch ({kind.__name__}); give the module that is inside, its attribute {inner[0]!r}"
    return f"is wrapped by torch ({kind.__name__}); {AGAIN}"


def _hooked(module: nn.Module, cached: bool) -> str | None:
    own = vars(module)
    if "_hf_hook" in own:
        return (
            f"is held by accelerate ({type(own['_hf_hook']).__name__}: offloading or a device map); take it off: "
            "pipe.remove_all_hooks(), or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    names = list(getattr(own.get("_diffusers_hook"), "hooks", {}))
    if names:
        registry = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)"
        off = "model.disable_cache()" if cached else f"{registry}.remove_hook({names[0]!r}, recurse=True)"
        return f"is held by diffusers' hook {names[0]!r} (a cache, offloading, casting ...); take it off: {off}"
    if module._forward_hooks or module._forward_pre_hooks:
        found = next(iter([*module._forward_hooks.values(), *module._forward_pre_hooks.values()]))
        name = getattr(found, "__qualname__", type(found).__name__)
        return (
            f"has forward hooks ({name}), which a trace cannot see; remove them before tracing: handle.remove(), or "
            "torch.nn.utils.remove_weight_norm and the like for what torch hooked in"
        )
    return None


def _replaced(module: nn.Module) -> str | None:
    forward = vars(module).get("forward")
    # Hooks that were taken off leave the class's own method behind.
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    name = getattr(forward, "__qualname__", type(forward).__name__)
    return f"has a forward put in the place of its class's ({name}), which a trace would not look into; {AGAIN}"


def _parametrised(module: nn.Module) -> str | None:
    if not parametrize.is_parametrized(module):
        return None
    name = next(iter(module.parametrizations))  # type: ignore[arg-type]
    return (
        f"computes its {name} by a parametrization; make it plain: "
        f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
    )


def _quantised(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    name = getattr(method, "value", method)
    return f"is quantised ({name or type(found).__name__}), and only plain weights can be pruned; load it unquantised"


def _odd_weights(model: nn.Module) -> Iterator[str]:
    """Say which weights are not plain tensors of floating-point numbers that can be computed with."""
    advice = "only plain floating-point weights can be pruned; load the model unquantised and in one piece"
    for name, parameter in model.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            yield f"keeps {name!r} as {type(parameter).__name__}, and {advice}"
        # One byte a number: float8 is for keeping, not for computing.
        if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.element_size() == 1:
            yield f"keeps {name!r} in {_name(parameter.dtype)}, and {advice}"
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            yield f"keeps {name!r} as {type(value).__name__}, and {advice}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
