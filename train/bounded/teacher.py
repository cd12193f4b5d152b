"""The teacher's pass: streamed block by block over calls, leaving in the cache what the students need."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ppcl_fx.io.memory import anonymous
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.partition import Watch, closure, parts
from ppcl_fx.tracing import with_rows
from ppcl_fx.train.bounded.cache import Cache, Damaged
from ppcl_fx.train.bounded.problems import Problem
from ppcl_fx.train.config import NO_LIMIT
from ppcl_fx.train.core.batches import Batches

_log = logging.getLogger("ppcl_fx.train")

Report = Callable[[int, int, str], None]
"""Told how far it is: what is done, of how much, and what it is."""


class Route:
    """The part of a pluggable graph that gives some problems' borders.

    Attributes:
        bundles: name -> the nodes whose values are cached together: those of one segment that the same problems read.
        of: for each problem's number, bundle and position of each value of its border.
    """

    def __init__(self, gm: GraphModule, problems: Sequence[Problem]) -> None:
        self.gm = gm
        nodes = {node.name: node for node in gm.graph.nodes}
        readers: dict[Node, list[int]] = {}
        for problem in problems:
            for name in problem.border:
                readers.setdefault(nodes[name], []).append(problem.number)
        self._needed = closure(gm, list(readers))
        self._segment = parts([node for node in gm.graph.nodes if node in self._needed])
        keys: dict[tuple[int, tuple[int, ...]], list[Node]] = {}
        for node in gm.graph.nodes:
            if node in readers:
                keys.setdefault((self._segment[node], tuple(readers[node])), []).append(node)
        self.bundles = {f"{number:03d}": tuple(group) for number, group in enumerate(keys.values())}
        place = {node: (name, i) for name, group in self.bundles.items() for i, node in enumerate(group)}
        self.of = {problem.number: [place[nodes[name]] for name in problem.border] for problem in problems}

    def skip(self, node: Node) -> bool:
        """Tell whether a node is not run."""
        return node not in self._needed

    def last(self, problem: Problem) -> int:
        """Return the last segment that a problem needs a value of."""
        return max(self._segment[node] for name, _ in self.of[problem.number] for node in self.bundles[name])

    def key(self, *more: str) -> str:
        """Return a digest of the bundles' contents and of `more`."""
        names = {name: [node.name for node in group] for name, group in self.bundles.items()}
        return hashlib.sha256(json.dumps([names, *more]).encode()).hexdigest()


class Teacher:
    """Gives the problems' borders: from the cache, or by running the teacher on the calls.

    The residency says where the weights come from and what keeps the calls' values between segments, `room` how many
    bytes of memory these may take.
    """

    def __init__(
        self,
        route: Route,
        batches: Batches,
        residency: Residency,
        cache: Cache,
        room: Callable[[], int],
        report: Report,
    ) -> None:
        self._route, self._batches, self._cache = route, batches, cache
        self._room, self._report = room, report
        assert residency.values is not None
        self._states = residency.values
        self._call = -1
        self._wanted: set[str] = set()
        self._last = -1
        watches = [Watch(nodes, self._keeper(name)) for name, nodes in route.bundles.items()]
        self._executor = Executor(route.gm, lambda gm: watches, residency, partial=True)

    def fill(self, problems: Sequence[Problem], calls: Sequence[int]) -> None:
        """Run the teacher, no further than for these problems, on those calls that the cache lacks. Raises PpclError
        where the disk is full, a call holds NaN, or lies outside of what was traced.
        """
        self._wanted = {name for problem in problems for name, _ in self._route.of[problem.number]}
        self._last = max((self._route.last(problem) for problem in problems), default=-1)
        self._fill(calls)

    def border(self, problem: Problem, call: int) -> list[Any]:
        """Return a problem's border for a call. What is damaged on disk is computed again, with a warning."""
        try:
            return self._cached(problem, call)
        except Damaged as error:
            _log.warning("cached values of call %d are computed again: %s", call, error)
            self._cache.drop(call)
            self._fill([call])
            return self._cached(problem, call)

    def _fill(self, calls: Sequence[int]) -> None:
        missing = [c for c in calls if not all(self._cache.has(c, name) for name in self._wanted)]
        if not missing:
            return
        shutil.rmtree(self._states.folder, ignore_errors=True)
        self._states.budget = self._room()
        total = (self._last + 1) * len(missing)
        for number in range(self._last + 1):

            def begin(position: int) -> None:
                self._call = missing[position]

            def end(position: int, _result: Any, number: int = number) -> None:
                self._report(number * len(missing) + position + 1, total, "running the teacher")

            given = prepared(self._route.gm, self._batches, missing)
            self._executor.run(range(number, number + 1), given, begin, end)
            self._states.forget_all_but(number + 1)
        # States of the last segment are nobody's input.
        shutil.rmtree(self._states.folder, ignore_errors=True)

    def _cached(self, problem: Problem, call: int) -> list[Any]:
        wanted = self._route.of[problem.number]
        found = {name: self._cache.get(call, name) for name in dict.fromkeys(name for name, _ in wanted)}
        return [found[name][position] for name, position in wanted]

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(*values: Any) -> None:
            if name in self._wanted and not self._cache.has(self._call, name):
                self._cache.put(self._call, name, values)

        return keep


def states_room(limit: int | None, block: int, aside: int = 0) -> int:
    """Return what is free of a limit for states between segments, with what a block takes and `aside` set aside."""
    return NO_LIMIT if limit is None else max(0, limit - anonymous() - block - aside)


def prepared(gm: GraphModule, batches: Batches, positions: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Return the keyword arguments of calls in the model's dtype, each made when it is asked for."""
    return (with_rows(gm, batches.one(position)) for position in positions)
