"""The contract of a pass, and the runner.

A pass is a frozen dataclass: its fields are its options. ``pass_(gm)`` edits `gm` in place and returns a `Result`
with ``graph_module`` and ``modified``, the convention of PyTorch's own `PassManager`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch.fx import GraphModule

from ppcl_fx._version import __version__

log = logging.getLogger("ppcl_fx.passes")


@dataclass(frozen=True)
class Refused:
    """An edit that a pass could not make: which, why, and the nodes' names."""

    edit: str
    reason: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a pass did.

    Attributes:
        graph_module: the graph module, edited in place.
        modified: whether anything changed; verified by the runner in debug mode.
        refused: the edits that were not made.
        names: old state-dict name -> new name, for the names that changed or were copied.
    """

    graph_module: GraphModule
    modified: bool
    refused: tuple[Refused, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclasses are frozen dataclasses and write `apply`.

    Attributes:
        name: kebab case.
        numerics: ``exact`` passes leave every output as it was, to the bit.
        kind: ``analysis`` passes only annotate ``node.meta["ppcl"]``; ``rewrite`` passes only edit.
    """

    name: ClassVar[str] = ""
    numerics: ClassVar[Literal["exact", "approximate"]] = "exact"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "rewrite"

    def requires(self, gm: GraphModule) -> None:
        """Raise `PpclError` when the pass cannot run on this graph at all."""

    def ensures(self, result: Result) -> None:
        """Raise when the result breaks what the pass promises."""

    def apply(self, gm: GraphModule) -> Result:
        """Do the work; `__call__` puts the checks around it."""
        raise NotImplementedError

    def __call__(self, gm: GraphModule) -> Result:
        """Run the pass on a graph module, in place."""
        self.requires(gm)
        result = self.apply(gm)
        if result.modified:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
        self.ensures(result)
        return result


def options(pass_: Pass) -> dict[str, Any]:
    """Return a pass's options by name."""
    return {f.name: getattr(pass_, f.name) for f in dataclasses.fields(pass_) if f.init}


def run(passes: Iterable[Pass], gm: GraphModule, *, debug: bool = False) -> Result:
    """Run passes one after the other and record them on the graph module.

    Each pass that changed something leaves ``{name, options, version}`` in ``gm.meta["ppcl"]["passes"]``.

    Args:
        passes: the passes, in order.
        gm: the graph module; edited in place.
        debug: compare the graph's text before and after, and raise where ``modified`` is not the truth.

    Raises:
        RuntimeError: in debug mode, a pass whose ``modified`` is wrong.
    """
    refused: list[Refused] = []
    names: dict[str, str] = {}
    modified = False
    for pass_ in passes:
        before = _text(gm) if debug else ""
        started = time.perf_counter()
        result = pass_(gm)
        log.debug("%s: %.1f ms, modified=%s", pass_.name, 1e3 * (time.perf_counter() - started), result.modified)
        gm = result.graph_module
        if debug and (before != _text(gm)) != result.modified:
            raise RuntimeError(
                f"the pass {pass_.name} says modified={result.modified}, but its graph "
                f"{'changed' if before != _text(gm) else 'did not change'}; return the truth in Result.modified"
            )
        modified |= result.modified
        refused += result.refused
        names |= result.names
        if result.modified:
            info = gm.meta.setdefault("ppcl", {})
            record = {"name": pass_.name, "options": options(pass_), "version": __version__}
            info["passes"] = [*info.get("passes", []), record]
            info.pop("kinds", None)  # the graphs for other kinds of call were not changed
    return Result(gm, modified, tuple(refused), names)


def _text(gm: GraphModule) -> str:
    return "\n".join(node.format_node() or str(node) for node in gm.graph.nodes)
