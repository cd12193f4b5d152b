"""What is patched while a trace runs: module calls, parameter reads, constructors, autocast, vmap, `len`, `int`."""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ppcl_fx.tracing.tracer import ExampleTracer

# Functions without a tensor argument: nothing in them would tell torch that a proxy is among the arguments.
CONSTRUCTORS = (
    "arange", "as_tensor", "empty", "eye", "finfo", "full", "iinfo", "linspace", "ones", "outer", "rand", "randn",
    "tensor", "zeros",
)  # fmt: skip


class _IntType(type):
    """Makes a stand-in for `int` that records the conversion of a proxy and is `int` in every other respect."""

    tracer: ExampleTracer

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and cls.tracer.is_proxy(args[0]):
            return cls.tracer.create_proxy("call_function", int, args, kwargs)
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


def _recorded(tracer: ExampleTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not tracer.recording:
            return function(*args, **kwargs)
        if function.__name__ == "vmap":
            tracer.refuse_vmap()
        return tracer.create_proxy("call_function", function, args, kwargs)

    return recorded


def _autocast_made(tracer: ExampleTracer, original: Callable[..., None]) -> Callable[..., None]:
    def make(context: Any, device_type: Any, dtype: Any = None, enabled: Any = True, cache_enabled: Any = None) -> None:
        if tracer.recording:
            context.asked = (device_type, enabled)
            device_type, dtype, enabled = "cpu", None, False  # the context itself does nothing to a trace
        elif device_type == "meta" and not enabled:
            device_type = "cpu"  # an example without values; torch knows no autocast for it
        original(context, device_type, dtype, enabled, cache_enabled)

    return make


def _autocast_entered(tracer: ExampleTracer, original: Callable[..., Any]) -> Callable[..., Any]:
    def enter(context: Any) -> Any:
        if tracer.recording:
            # A decorator's context was made when its function was defined.
            tracer.leave_autocast(*vars(context).get("asked", (context.device, context._enabled)))
        return original(context)

    return enter


def _model_namespaces(root: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of the Python modules that the model's own code lives in (never torch's)."""
    packages = {type(module).__module__.rpartition(".")[0] for module in root.modules()}
    packages = {package for package in packages if package and package.split(".")[0] != "torch"}
    own = {type(module).__module__ for module in root.modules()}
    # The helpers beside a model (rotary embeddings, attention dispatch) live one package up in diffusers.
    parents = {package.rpartition(".")[0] for package in packages if package.count(".") >= 2}
    wanted = packages | parents
    names = [
        name
        for name in list(sys.modules)
        if not name.startswith("torch") and (name in own or name.rpartition(".")[0] in wanted)
    ]
    return [vars(sys.modules[name]) for name in names if sys.modules.get(name) is not None]


def _dynamo_table() -> int:
    """Return the size of the table of torch's functions that Dynamo makes at its first use; 0 before."""
    rules = sys.modules.get("torch._dynamo.trace_rules")
    return 0 if rules is None else int(rules.get_torch_obj_rule_map.cache_info().currsize)


@contextlib.contextmanager
def patched(tracer: ExampleTracer, root: nn.Module) -> Iterator[None]:
    """Redirect module calls, parameter reads, constructors, contexts, `len` and `int` to the tracer; put all back."""
    # A device context remembers torch's constructors the first time it is used; it must not meet ours.
    with torch.device("meta"):
        torch.empty(0)
    table = _dynamo_table()
    undo: list[Callable[[], None]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    original_call = nn.Module.__call__
    original_getattr = nn.Module.__getattr__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.recording and id(module) in tracer.paths:
            return tracer.call_module(module, args, kwargs)
        return original_call(module, *args, **kwargs)

    def read(module: nn.Module, name: str) -> Any:
        value = original_getattr(module, name)
        if tracer.recording and isinstance(value, torch.Tensor):
            return tracer.read_tensor(value)
        return value

    def length(value: Any) -> Any:
        return tracer.create_proxy("call_function", len, (value,), {}) if tracer.is_proxy(value) else len(value)

    int_type = _IntType("int", (), {})
    int_type.tracer = tracer
    try:
        replace(nn.Module, "__call__", call)
        replace(nn.Module, "__getattr__", read)
        for owner, name in [*((torch, name) for name in CONSTRUCTORS), (torch, "vmap"), (torch.func, "vmap")]:
            replace(owner, name, _recorded(tracer, getattr(owner, name)))
        replace(torch.autocast, "__init__", _autocast_made(tracer, torch.autocast.__init__))
        replace(torch.autocast, "__enter__", _autocast_entered(tracer, torch.autocast.__enter__))
        for names in _model_namespaces(root):
            for name, stand_in in (("len", length), ("int", int_type)):
                if names.get(name, getattr(builtins, name)) is getattr(builtins, name):
                    names[name] = stand_in
                    undo.append(functools.partial(names.pop, name, None))
        yield
    finally:
        for step in reversed(undo):
            step()
        if _dynamo_table() > table:
            # Flex attention compiles itself; what Dynamo then took for torch's constructors were ours.
            sys.modules["torch._dynamo.trace_rules"].clear_lru_cache()
