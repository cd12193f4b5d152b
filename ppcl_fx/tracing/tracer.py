"""The tracer: runs a shadow of the model on proxies that carry example values, and writes down a graph."""

from __future__ import annotations

import collections
import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.fx.proxy import Scope, TracerBase

from ppcl_fx.errors import PpclError, ValuesNeeded
from ppcl_fx.ir.graphs import attribute
from ppcl_fx.tracing.examples import (
    META,
    UnknownValue,
    Values,
    examples,
    function_of,
    map_tensors,
    shadow,
    signature,
    to_meta,
)
from ppcl_fx.tracing.guards import autocast_enabled, expect, expect_tensor
from ppcl_fx.tracing.patches import patched
from ppcl_fx.tracing.proxies import ExampleProxy


class ExampleTracer(TracerBase):
    """Records a module into a graph, deciding branches by example values and guarding each decision.

    The module is not run; a copy of it on the meta device is. Modules at the paths `inlined` are looked into; every
    other one becomes one ``call_module`` node. Inputs and outputs of those at the paths `blocks` are noted on nodes.
    """

    def __init__(self, root: nn.Module, inlined: set[str], blocks: set[str]) -> None:
        super().__init__()
        self.graph = Graph(tracer_cls=None)
        self.scope = Scope("", None)
        self.module_stack = collections.OrderedDict()
        self.node_name_to_scope = {}
        self.model = root
        self.root, self._plain = shadow(root)
        self.root.eval()  # a branch by `training` is no decision of the call: a graph is what the model computes in use
        self.inlined = inlined
        self.blocks = blocks
        self.paths = {id(module): path for path, module in self.root.named_modules()}
        self._tensors = {id(t): name for name, t in self.root.named_parameters(remove_duplicate=False)}
        self._tensors |= {id(t): name for name, t in self.root.named_buffers(remove_duplicate=False)}
        self._known: dict[Hashable, Any] = {}
        self._read: dict[int, ExampleProxy] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.values = Values(root, {})
        self._structural: set[Node] = set()
        self._containers: set[Node] = set()
        self._guarded: set[tuple[Node, str]] = set()
        self.recording = False
        parameter = next(iter(root.parameters()), None)
        on = parameter.device if parameter is not None else torch.device("cpu")
        self.device = torch.device("cpu") if on.type == "meta" else on

    # ---- running -----------------------------------------------------------------------------------------------

    def trace(self, symbolic: Mapping[str, Any], fixed: Mapping[str, Any]) -> Graph:
        """Trace ``root.forward(**symbolic, **fixed)``; the symbolic arguments become placeholders.

        Their tensors are taken to the meta device, and looked at only where the model reads a mask or a length in
        Python. The fixed ones (``None``, booleans, strings) are part of the trace as they are.
        """
        self.values = Values(self.model, symbolic)
        proxies = {}
        for name, value in symbolic.items():
            node = self.create_node("placeholder", name, (), {})
            node.meta["val"] = to_meta(value)
            if isinstance(value, torch.Tensor):
                self._guard_dims(node, f"the input {name!r}")
            else:
                self._containers.add(node)
            proxies[name] = ExampleProxy(node, self)
        with torch.no_grad(), patched(self, self.root):
            self.recording = True
            try:
                result = self._forward(self.root, "", (), {**proxies, **fixed})
            finally:
                self.recording = False
        self.graph.output(self.create_arg(result))
        output = self.graph.output_node()
        output.meta["val"] = map_arg(output.args[0], lambda node: node.meta["val"])
        return self.graph

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.paths[id(module)]
        self.module_stack[path] = (path, type(module))
        try:
            if path not in self.inlined:
                return self.create_proxy("call_module", path, args, kwargs)
            if path in self.blocks:
                code = module.forward.__code__
                names = code.co_varnames[1 : code.co_argcount]
                for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                    _note(value, "block_in", (path, name))
            result = self._forward(module, path, args, kwargs)
            if path in self.blocks:
                parts = result if isinstance(result, (tuple, list)) and not self.is_proxy(result) else (result,)
                for position, value in enumerate(parts):
                    _note(value, "block_out", (path, position))
            return result
        finally:
            self.module_stack.popitem()

    @staticmethod
    def _forward(module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module._forward_pre_hooks or module._forward_hooks:
            where = f"module {path!r}" if path else "the model"
            raise PpclError(f"{where} has forward hooks, which a trace cannot see; remove them before tracing")
        return module.forward(*args, **kwargs)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        was, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = was

    # ---- values ------------------------------------------------------------------------------------------------

    @staticmethod
    def is_proxy(value: Any) -> bool:
        """Tell whether a value is symbolic (`isinstance` answers with the example's type)."""
        return issubclass(type(value), ExampleProxy)

    def read_tensor(self, tensor: torch.Tensor) -> Any:
        """Return the ``get_attr`` proxy of a parameter, a buffer, or a plain tensor attribute of the shadow."""
        if id(tensor) in self._read:
            return self._read[id(tensor)]
        name = self._tensors.get(id(tensor))
        if name is None:
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = self._plain.get(id(tensor), tensor)
            self._tensors[id(tensor)] = name
        node = self.create_node("get_attr", name, (), {})
        node.meta["val"] = to_meta(tensor)
        with self._paused():
            # A constant stands nowhere in the model yet.
            node.meta["actual"] = self.constants[name] if name in self.constants else attribute(self.model, name)
        node.meta["kept"] = tensor  # ids are keys above: the tensor must stay alive while tracing
        self._read[id(tensor)] = proxy = ExampleProxy(node, self)
        return proxy

    def create_arg(self, a: Any) -> Any:
        """Turn a value into a graph argument; stray tensors become attributes of the graph module."""
        if isinstance(a, torch.Tensor) and not self.is_proxy(a):
            return self.read_tensor(a).node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> Any:
        """Record one operation and compute its example. An operation whose result is ``None`` returns ``None``."""
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), *more, **others)
        node.meta["val"] = value = self._evaluate(node)
        if value is None and not node.is_impure():
            self.graph.erase_node(node)
            return None
        self._classify(node, value)
        return ExampleProxy(node, self)

    def _evaluate(self, node: Node) -> Any:
        args, kwargs = examples(tuple(node.args)), examples(dict(node.kwargs))
        if node.target is getattr and args[1] == "device":
            return self.device
        if node.target is getattr and isinstance(args[0], torch.device):
            return getattr(self.device, args[1])  # a model that asks where it runs means its own place
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        key = signature(module if module is not None else node.target, args, kwargs)
        # Look-alike blocks ask the same questions again and again.
        if key is not None and key in self._known:
            return map_tensors(self._known[key], torch.Tensor.detach)  # an object of its own
        try:
            with self._paused(), META:
                value = (function_of(node) if module is None else module)(*args, **kwargs)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if isinstance(error, ValueError) and not _for_want_of_values(error):
                raise
            with self._paused():
                return self._evaluate_by_value(node, module, error)
        if key is not None:
            self._known[key] = map_tensors(value, torch.Tensor.detach)
        return value

    def _evaluate_by_value(self, node: Node, module: nn.Module | None, why: Exception) -> Any:
        """Compute the example of an operation whose result depends on what its arguments hold."""
        try:
            try:
                value = self.values.stand_in(node, module)
            except (NotImplementedError, RuntimeError):
                value = self.values.of(node)
            # A number read from a tensor is a decision in the making: no stand-in will do.
            if module is None and not isinstance(value, (torch.Tensor, tuple)):
                value = self.values.of(node)
        except UnknownValue as unknown:
            if not _for_want_of_values(why):
                raise why from None
            raise ValuesNeeded(
                f"{self._where()} reads a tensor's values to decide what to compute ({node.target}), and "
                f"{unknown.name} has none; trace with actual inputs, not with inputs on the meta device"
            ) from why
        return to_meta(value)

    def _classify(self, node: Node, value: Any) -> None:
        """Note what follows from the number of dimensions alone, and what was taken out of a given container."""
        sources = node.all_input_nodes
        dims = node.target is getattr and node.args[1] == "ndim"
        dims |= node.op == "call_method" and node.target == "dim"
        length = node.target is len and (
            isinstance(sources[0].meta["val"], torch.Size) or _has_fixed_length(sources[0])
        )
        derived = bool(sources) and all(source in self._structural for source in sources)
        if dims or length or derived:
            self._structural.add(node)
        if sources and sources[0] in self._containers and node.target in (operator.getitem, getattr):
            if isinstance(value, torch.Tensor):
                self._guard_dims(node, f"{node.name}, an item of the input {sources[0].name!r}")
            else:
                self._containers.add(node)

    # ---- decisions ---------------------------------------------------------------------------------------------

    def decide(self, proxy: ExampleProxy, kind: Callable[[Any], Any]) -> Any:
        """Answer a Python question (``bool``, ``int``, ``float``) about a proxy by its example, and guard it."""
        try:
            value = kind(proxy.example)
        except (NotImplementedError, RuntimeError) as error:
            value = kind(self._value(proxy.node, error))
        words = f"{kind.__name__}({proxy.node.name}) at {self._where()}"
        # What was decided is the answer, not the value: a list that is not empty may hold anything.
        same = type(proxy.example) is type(value)
        self.guard(proxy.node if same else self.create_proxy("call_function", kind, (proxy,), {}).node, value, words)
        return value

    def _value(self, node: Node, why: Exception) -> Any:
        try:
            with self._paused():
                return self.values.of(node)
        except UnknownValue as unknown:
            raise PpclError(
                f"{self._where()} decides by the values of a tensor ({node.name}), and {unknown.name} has none; "
                "trace with actual inputs and weights, not on the meta device"
            ) from why

    def leave_autocast(self, device_type: Any, enabled: bool) -> None:
        """Note that a part of the model runs without autocast; a graph cannot switch it, so later calls must be so."""
        if enabled:
            raise PpclError(
                f"{self._where()} switches autocast on for a part of the model, which a trace cannot keep; "
                "give a model that computes in one dtype"
            )
        on = self.create_proxy("call_function", autocast_enabled, (device_type,), {})
        if on.example:
            raise PpclError(
                f"{self._where()} switches autocast off for a part of the model, which a trace cannot keep; "
                "trace outside of autocast"
            )
        self.guard(on.node, False, f"autocast at {self._where()}")

    def refuse_vmap(self) -> NoReturn:
        """Raise `PpclError`: a trace cannot follow `torch.vmap`, whose C++ side knows nothing of proxies."""
        raise PpclError(
            f"{self._where()} maps a function over proxies by torch.vmap (flex attention makes its block masks so), "
            "which a trace cannot follow; call the model in a way that needs no such mask"
        )

    def decide_length(self, proxy: ExampleProxy) -> int:
        """Answer ``len(proxy)``; guarded unless it follows from the graph itself."""
        example = proxy.example
        if not hasattr(example, "__len__"):
            raise TypeError(f"object of type {type(example).__name__!r} has no len()")
        if isinstance(example, torch.Tensor):
            return int(self.decide(proxy.shape[0], operator.index))
        if not isinstance(example, torch.Size) and not _has_fixed_length(proxy.node):
            length = self.create_proxy("call_function", len, (proxy,), {})
            self.guard(length.node, len(example), f"the length of {proxy.node.name} at {self._where()}")
        return len(example)

    def guard(self, node: Node, expected: Any, words: str) -> None:
        """Check ``node == expected`` on every later call, unless the inputs' dimensions already settle it."""
        if node in self._structural or (node, repr(expected)) in self._guarded:
            return
        self._guarded.add((node, repr(expected)))
        check = self.create_node("call_function", expect, (node, self.create_arg(expected), words), {})
        check.meta["val"] = None

    def _guard_dims(self, node: Node, words: str) -> None:
        check = self.create_node("call_function", expect_tensor, (node, node.meta["val"].ndim, words), {})
        check.meta["val"] = None

    def _where(self) -> str:
        frame = sys._getframe(1)
        skipped = (__file__, __file__.replace("tracer.py", "proxies.py"), __file__.replace("tracer.py", "patches.py"))
        while frame.f_back is not None and (
            frame.f_code.co_filename in skipped or "/torch/" in frame.f_code.co_filename
        ):
            frame = frame.f_back
        name = frame.f_code.co_filename.rpartition("/")[2]
        inside = next(reversed(self.module_stack), "")
        return f"{name}:{frame.f_lineno}" + (f" in {inside}" if inside else "")


def _note(value: Any, key: str, entry: tuple[str, Any]) -> None:
    """Append an entry to a node's meta; tuples, because shallow copies of a graph share them."""
    if ExampleTracer.is_proxy(value):
        value.node.meta[key] = (*value.node.meta.get(key, ()), entry)


def _for_want_of_values(error: Exception) -> bool:
    words = str(error).lower()
    return "meta" in words or "data-dependent" in words


def _has_fixed_length(node: Node) -> bool:
    """Tell whether a sequence is as long on every call: a module's tuple, or as many chunks as were asked for."""
    if node.op == "call_module":
        return isinstance(node.meta["val"], tuple)
    if node.target not in ("chunk", torch.chunk):
        return False
    count = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
    return isinstance(count, int) and len(node.meta["val"]) == count
