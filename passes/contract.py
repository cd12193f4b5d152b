"""The contract of a pass: what it declares, how it is run, and the pipeline of several."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from ppcl_fx._version import __version__
from ppcl_fx.ir.meta import graph_info

log = logging.getLogger("ppcl_fx.passes")

Kind = Literal["analysis", "rewrite"]
Numerics = Literal["exact", "approximate"]

REGISTRY: dict[str, type[Pass]] = {}
"""Every pass class by its name; a class enters it when it is created (see `ppcl_fx.passes.registry`)."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_BARE = re.compile(r"[\w.:+-]+")


class Refused(NamedTuple):
    """An edit that a pass could not make: which, why, and the nodes' names."""

    edit: str
    reason: str
    nodes: tuple[str, ...] = ()


class Result(PassResult):
    """What a pass did: PyTorch's `PassResult` with two attributes more, so any pass manager of that kind runs a pass.

    `modified` says whether anything changed in the graph module, which is edited in place.
    """

    refused: tuple[Refused, ...]
    """The edits that were not made."""
    names: Mapping[str, str]
    """Old state-dict name -> new name, for the names that changed or were copied."""

    def __new__(
        cls,
        graph_module: nn.Module,
        modified: bool,
        refused: Iterable[Refused] = (),
        names: Mapping[str, str] | None = None,
    ) -> Result:
        made = super().__new__(cls, graph_module, modified)
        assert isinstance(made, Result)
        made.refused, made.names = tuple(refused), dict(names or {})
        return made


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclasses are frozen dataclasses whose fields are their options, and write `apply`::

    @dataclass(frozen=True)
    class DropGuards(Pass, name="drop-guards", kind="rewrite", numerics="exact"):
    """

    name: ClassVar[str]
    """In kebab case, one pass a name."""
    kind: ClassVar[Kind]
    """An ``analysis`` only annotates ``node.meta["ppcl"]``; a ``rewrite`` only edits."""
    numerics: ClassVar[Numerics]
    """``exact`` passes leave every output as it was, to the bit."""

    def __init_subclass__(cls, *, name: str, kind: Kind, numerics: Numerics) -> None:
        super().__init_subclass__()
        if not _NAME.fullmatch(name):
            raise TypeError(f"{cls.__qualname__}: a pass's name is in kebab case, not {name!r}")
        for said, known in ((kind, get_args(Kind)), (numerics, get_args(Numerics))):
            if said not in known:
                raise TypeError(f"{cls.__qualname__}: {said!r} is none of {', '.join(known)}")
        other = REGISTRY.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__}: {other.__module__}.{other.__qualname__} is called {name!r} already")
        cls.name, cls.kind, cls.numerics = name, kind, numerics
        REGISTRY[name] = cls

    @property
    def __name__(self) -> str:
        """The pass's name, which the pass managers of other compilers ask for."""
        return self.name

    def __str__(self) -> str:
        """The pass as `ppcl_fx.passes.registry.parse` reads it, ``cut-depth{stack=blocks,first=3,last=5}``."""
        own = [f for f in dataclasses.fields(self) if f.init]
        shown = [f"{f.name}={_text(getattr(self, f.name))}" for f in own if getattr(self, f.name) != _default(f)]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    def requires(self, gm: GraphModule) -> None:
        """Raise `PpclError` when the pass cannot run on this graph at all."""

    def ensures(self, result: Result) -> None:
        """Raise when the result breaks what the pass promises."""

    def apply(self, gm: GraphModule) -> Result:
        """Do the work; `__call__` puts the checks around it."""
        raise NotImplementedError

    def __call__(self, gm: GraphModule) -> Result:
        """Run the pass on a graph module, in place."""
        result = self._step(gm)
        if result.modified:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
        return result

    def _step(self, gm: GraphModule) -> Result:
        """Run the pass and stamp what it changed: ``gm.meta["ppcl"]["passes"]`` and ``["names"]``."""
        started = time.perf_counter()
        self.requires(gm)
        result = self.apply(gm)
        self.ensures(result)
        log.debug("%s: %.1f ms, modified=%s", self, 1e3 * (time.perf_counter() - started), result.modified)
        if result.modified:
            self._stamp(result.graph_module, result.names)
        return result

    def _stamp(self, gm: GraphModule, names: Mapping[str, str]) -> None:
        gm.meta["ppcl"] = dict(graph_info(gm))  # a copy of the graph may share it
        info = graph_info(gm)
        record = {"name": self.name, "options": options(self), "version": __version__}
        info["passes"] = [*info.get("passes", []), record]
        info["names"] = {**info.get("names", {}), **names}
        info.pop("kinds", None)  # the graphs for other kinds of call were not changed


@dataclass(frozen=True)
class Pipeline(Pass, name="pipeline", kind="rewrite", numerics="approximate"):
    """Run passes one after the other, as one pass.

    It is an analysis when all of them are, and exact when all of them are. The graph is linted once, at the end; with
    `debug` each pass is held to what it declares and says: the graph is linted after each one, and a RuntimeError
    raised where ``modified`` is not the truth or an analysis edits.
    """

    passes: Iterable[Pass]
    debug: bool = False

    def __post_init__(self) -> None:
        members = tuple(self.passes)
        vars(self)["passes"] = members
        vars(self)["kind"] = "analysis" if all(member.kind == "analysis" for member in members) else "rewrite"
        vars(self)["numerics"] = "exact" if all(member.numerics == "exact" for member in members) else "approximate"

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def apply(self, gm: GraphModule) -> Result:
        modified, refused, names = False, list[Refused](), dict[str, str]()
        for member in self.passes:
            before = _state(gm) if self.debug else {}
            result = member._step(gm)
            gm = result.graph_module
            if self.debug:
                _hold(member, result.modified, before, _state(gm))
                gm.graph.lint()
            modified |= result.modified
            refused += result.refused
            names |= result.names
        return Result(gm, modified, refused, names)

    def _stamp(self, gm: GraphModule, names: Mapping[str, str]) -> None:
        """Stamp nothing: each member did."""


def options(pass_: Pass) -> dict[str, Any]:
    """Return a pass's options by name."""
    return {f.name: getattr(pass_, f.name) for f in dataclasses.fields(pass_) if f.init}


def as_lowering(pass_: Pass) -> Callable[..., GraphModule]:
    """Return a pass as a function of a graph module and settings, as Torch-TensorRT's lowering passes are."""

    def lowering(gm: GraphModule, settings: object = None) -> GraphModule:
        made = pass_(gm).graph_module
        assert isinstance(made, GraphModule)
        return made

    lowering.__name__ = pass_.__name__.replace("-", "_")
    return lowering


def _default(option: dataclasses.Field[Any]) -> Any:
    made = option.default_factory
    return option.default if made is dataclasses.MISSING else made()


def _text(value: Any) -> str:
    """Write one option's value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, frozenset | tuple):
        value = "+".join(sorted(map(str, value)) if isinstance(value, frozenset) else map(str, value))
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


# ---- debug mode --------------------------------------------------------------------------------------------------


class _Held:
    """An object by identity; it is held, so that no other object gets its id."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _state(gm: GraphModule) -> dict[str, list[Any]]:
    """Return all of a graph module that a pass may change, comparable with ``==``."""
    modules = [(name, m) for name, m in gm.named_modules() if m is not gm]
    tensors = [*gm.named_parameters(), *gm.named_buffers()]
    metas = [{key: _Held(value) for key, value in n.meta.items() if key != "ppcl"} for n in gm.graph.nodes]
    return {
        "graph": [(n, n.name, n.op, n.target, n.args, n.kwargs) for n in gm.graph.nodes],
        "modules": [(name, _Held(m), type(m), m.extra_repr(), m.training) for name, m in modules],
        "weights": [(name, _Held(t), None if t.is_inference() else t._version, t.requires_grad) for name, t in tensors],
        "node metas": metas,
    }


def _hold(pass_: Pass, modified: bool, before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> None:
    changed = [part for part in before if before[part] != after[part]]
    if pass_.kind == "analysis" and changed:
        raise RuntimeError(
            f"the pass {pass_.name} is an analysis, but it changed the {changed[0]}; "
            'write on node.meta["ppcl"] alone, or make it a rewrite'
        )
    truth = any(part != "node metas" for part in changed)
    if truth != modified:
        what = f"{changed[0]} changed" if truth else "graph did not change, nor did a module or a weight"
        raise RuntimeError(
            f"the pass {pass_.name} says modified={modified}, but its {what}; return the truth in Result.modified"
        )
