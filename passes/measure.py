"""One forward pass of the teacher for each call, and all that the analysis passes need from it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.curves import curves
from ppcl_fx.passes.held_out import Division, HeldOutFit, Kind
from ppcl_fx.passes.probes import Fit, Projector
from ppcl_fx.passes.reservoir import Key, Reservoir, ranks
from ppcl_fx.passes.similarity import Curves
from ppcl_fx.passes.watch import Watch, Watcher
from ppcl_fx.sites import FfnSite, ffn_sites
from ppcl_fx.stacks import Block, Stack, stacks
from ppcl_fx.tracing import graph_for

if TYPE_CHECKING:
    from ppcl_fx.calls import Call

Progress = Callable[[int, int], None]
"""Called with the number of calls done and the number of all."""

SAMPLES = 160
"""Sample-timesteps that CKA averages over: the size of the paper's calibration set."""

SEVERAL = (
    "the calls are of several kinds, and some go through other blocks than the rest (a guidance that skips blocks, "
    "perhaps); record without it"
)
"""What to say of calls whose sums cannot be added."""

MEMORY = 4 * 2**30
"""Bytes of activations kept at most."""


@dataclass(frozen=True, eq=False)
class StreamSite:
    """One stream through one stack: the nodes that enter and leave each block, in order."""

    stack: Stack
    stream: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def key(self) -> Key:
        """Stack name and stream."""
        return self.stack.name, self.stream

    @property
    def title(self) -> str:
        """Stack and stream in words."""
        return f"stack {self.stack.name}, {self.stream} stream"


@dataclass(eq=False)
class Measurement(abc.ABC):
    """What the analysis passes ask of a run of the teacher, however it was run.

    Attributes:
        gm: the graph that ran.
        streams: every stream of every stack.
        ffn: every feed-forward with its block.
        calls_used: how many calls ran.
        held_out: what of them fits are judged on.
    """

    gm: GraphModule
    streams: tuple[StreamSite, ...]
    ffn: tuple[tuple[Block, FfnSite], ...]
    calls_used: int = field(default=0, kw_only=True)
    held_out: Kind | None = field(default=None, kw_only=True)

    def require(self, gm: GraphModule) -> None:
        """Check that `gm` is the graph that was measured.

        Raises:
            PpclError: it is another graph.
        """
        if gm.graph is not self.gm.graph:
            raise PpclError("the measurements belong to another graph; run measure() on this one first")

    @property
    @abc.abstractmethod
    def samples_used(self) -> int:
        """How many samples the curves average over."""

    @abc.abstractmethod
    def fits(self, site: StreamSite, ridge: float, refine_steps: int) -> list[float]:
        """Relative squared error of each block's probe on what was held out."""

    @abc.abstractmethod
    def few(self, site: StreamSite) -> str:
        """What to say where the probes of a stream were solved from few tokens; else nothing."""

    @abc.abstractmethod
    def energies(self, site: StreamSite) -> list[float]:
        """Mean squared length of a token of each block's output."""

    @abc.abstractmethod
    def ffn_fits(self, ridge: float) -> list[Fit]:
        """How well a projector stands in for each feed-forward of `ffn`."""

    @abc.abstractmethod
    def batches(self, site: StreamSite) -> Iterator[list[Tensor]]:
        """The kept samples of a stream in batches of one shape: ``[B, T, D]`` before the stack and after each block."""

    @abc.abstractmethod
    def curves(self, site: StreamSite, ridge: float, refine_steps: int) -> Curves:
        """CKA and gap curves and the heatmap over the kept samples."""


@dataclass(eq=False)
class Measured(Measurement):
    """Sums over all tokens of all calls, and the kept activations of some samples; results are computed when
    asked for."""

    kept: Reservoir
    probe_sums: dict[Key, list[HeldOutFit]] = field(default_factory=dict)
    ffn_sums: list[HeldOutFit] = field(default_factory=list)
    _probes: dict[tuple[Key, float, int], list[Projector]] = field(default_factory=dict)
    _curves: dict[tuple[Key, float, int], Curves] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where curves are computed."""
        return next((parameter.device for parameter in self.gm.parameters()), torch.device("cpu"))

    def probes(self, site: StreamSite, ridge: float, refine_steps: int) -> list[Projector]:
        """The solved probe of each block (Eq. 1, refined by Eq. 2)."""
        key = (site.key, ridge, refine_steps)
        if key not in self._probes:
            self._probes[key] = [sums.solve(ridge, refine_steps) for sums in self.probe_sums[site.key]]
        return self._probes[key]

    def fits(self, site: StreamSite, ridge: float, refine_steps: int) -> list[float]:
        """Relative squared error of each block's probe on what was held out."""
        solved = self.probes(site, ridge, refine_steps)
        return [sums.error(probe) for sums, probe in zip(self.probe_sums[site.key], solved, strict=True)]

    def energies(self, site: StreamSite) -> list[float]:
        """Mean squared length of a token of each block's output."""
        return [sums.energy for sums in self.probe_sums[site.key]]

    def few(self, site: StreamSite) -> str:
        """What to say where the probes of a stream were solved from few tokens; else nothing."""
        return self.probe_sums[site.key][0].few

    def ffn_fits(self, ridge: float) -> list[Fit]:
        """How well a projector stands in for each feed-forward of `ffn`."""
        return [sums.fit(sums.solve(ridge)) for sums in self.ffn_sums]

    def batches(self, site: StreamSite) -> Iterator[list[Tensor]]:
        """The kept samples of a stream in batches of one shape: ``[B, T, D]`` before the stack and after each block."""
        return self.kept.batches(site.key, self.device)

    @property
    def samples_used(self) -> int:
        """How many samples the curves average over."""
        return len(self.kept)

    def curves(self, site: StreamSite, ridge: float, refine_steps: int) -> Curves:
        """CKA and gap curves and the heatmap over the kept samples."""
        key = (site.key, ridge, refine_steps)
        if key not in self._curves:
            solved = self.probes(site, ridge, refine_steps)
            self._curves[key] = curves((states[1:] for states in self.batches(site)), solved)
        return self._curves[key]


def stream_sites(gm: GraphModule) -> list[StreamSite]:
    """Every stream of every stack of `gm`.

    Raises:
        PpclError: the graph has no block stack.
    """
    sites = []
    for stack in stacks(gm):
        for stream in stack.streams:
            blocks = [block for block in stack.blocks if stream in block.inputs and stream in block.outputs]
            if len(blocks) == len(stack.blocks):
                inputs = tuple(block.inputs[stream] for block in blocks)
                sites.append(
                    StreamSite(stack, stream, inputs, tuple(block.outputs[stream] for block in blocks))
                )
    if not sites:
        raise PpclError("the model has no stack of transformer blocks; there is nothing to analyse")
    return sites


def ffn_title(site: FfnSite) -> str:
    """Return what a feed-forward is called in messages."""
    return f"{site.block}, {site.stream} feed-forward"


def all_ffn_sites(gm: GraphModule) -> tuple[tuple[Block, FfnSite], ...]:
    """Every feed-forward of every block of `gm`, with its block."""
    blocks = [block for stack in stacks(gm) for block in stack.blocks]
    return tuple((block, site) for block in blocks for site in ffn_sites(gm, block))


def measure(
    gm: GraphModule,
    calls: Sequence[Call],
    *,
    max_samples: int = SAMPLES,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Measured:
    """Run the teacher once on each call and collect the statistics of all analysis passes.

    Args:
        gm: a traced graph; it is not changed.
        calls: recorded calls. Every token of every call is a sample of the probes.
        max_samples: how many sample-timesteps CKA averages over (chosen evenly at random, the same ones each
            time).
        memory: bytes of activations kept for CKA; fewer samples are kept where they do not fit.
        progress: called after each call.

    Raises:
        PpclError: there are no calls, the model has no blocks, or a value is NaN or infinite.
    """
    check_request(calls, max_samples)
    sites, found = tuple(stream_sites(gm)), all_ffn_sites(gm)
    measured = Measured(gm, sites, found, Reservoir(max_samples, memory))
    division = Division(calls)
    collector = _Collector(measured, division)
    watches = collector.watches()
    watchers: dict[GraphModule, Watcher] = {}
    for position, call in enumerate(calls):
        graph = graph_for(gm, call.kwargs)
        if graph not in watchers:
            watchers[graph] = Watcher(graph, mirrored(watches, gm, graph))
        collector.begin(position, call.batch)
        watchers[graph].watch(call.kwargs)
        collector.end()
        if progress is not None:
            progress(position + 1, len(calls))
    measured.calls_used, measured.held_out = len(calls), division.kind
    return measured


def check_request(calls: Sequence[Call], max_samples: int) -> None:
    """Raise `PpclError` where there is nothing to measure."""
    if not len(calls):
        raise PpclError("there are no calls to analyse; record some first")
    if max_samples < 1:
        raise PpclError(f"max_samples is {max_samples}; CKA needs at least one sample")


class _Collector:
    """Observers that feed one `Measured`."""

    def __init__(self, measured: Measured, division: Division) -> None:
        self._measured = measured
        self._division = division
        self._call = self._batch = 0
        self._ranks: list[float] | None = None
        self._rows: dict[int, dict[Key, list[Tensor]]] = {}

    def watches(self) -> list[Watch]:
        """What to watch: each block's input with its output, each state alone, each feed-forward's two
        ends."""
        out = []
        for site in self._measured.streams:
            out.append(Watch((site.inputs[0],), partial(self._keep, site.key)))
            sums = [HeldOutFit(site.title, self._division) for _ in site.outputs]
            self._measured.probe_sums[site.key] = sums
            for before, after, equations in zip(site.inputs, site.outputs, sums, strict=True):
                out.append(Watch((before, after), equations.add))
                out.append(Watch((after,), partial(self._keep, site.key)))
        for _, ffn in self._measured.ffn:
            equations = HeldOutFit(ffn_title(ffn), self._division, bias=True)
            self._measured.ffn_sums.append(equations)
            out.append(Watch((ffn.before, ffn.after), equations.add))
        return out

    def begin(self, position: int, batch: int) -> None:
        """A call of so many samples starts."""
        self._division.begin(position)
        self._call, self._batch, self._ranks, self._rows = position, batch, None, {}

    def end(self) -> None:
        """A call is over: hand its chosen samples to the reservoir."""
        for row, activations in self._rows.items():
            assert self._ranks is not None
            self._measured.kept.add(self._ranks[row], activations)

    def _keep(self, key: Key, state: Tensor) -> None:
        check_state(key, state)
        state = rows_of(state, self._batch)
        if self._ranks is None:
            self._ranks = ranks(self._call, len(state))
            self._rows = {row: {} for row, rank in enumerate(self._ranks) if self._measured.kept.wants(rank)}
        for row, activations in self._rows.items():
            activations.setdefault(key, []).append(state[row].to("cpu", copy=True))


def rows_of(state: Tensor, batch: int) -> Tensor:
    """Return a stream's state with a row for each sample: before the first block one may stand for all of them."""
    return state.expand(batch, *state.shape[1:]) if len(state) == 1 else state


def mirrored(watches: Sequence[Watch], gm: GraphModule, other: GraphModule) -> list[Watch]:
    """Return watches of a graph as watches of the same model's graph for another kind of call; observers are shared.

    Raises:
        PpclError: calls of that kind go through other blocks.
    """
    if other is gm:
        return list(watches)
    mine, theirs = _ends(gm), _ends(other)
    if mine.keys() != theirs.keys():
        raise PpclError(SEVERAL)
    twin = {node: theirs[name] for name, node in mine.items()}
    return [Watch(tuple(twin[node] for node in watch.nodes), watch.observer) for watch in watches]


def _ends(gm: GraphModule) -> dict[Any, Node]:
    """Return the nodes that are looked at, by what they are."""
    found: dict[Any, Node] = {}
    for site in stream_sites(gm):
        for block, before, after in zip(site.stack.blocks, site.inputs, site.outputs, strict=True):
            found[block.path, site.stream, "in"], found[block.path, site.stream, "out"] = before, after
    for number, (block, ffn) in enumerate(all_ffn_sites(gm)):
        found[block.path, number, "in"], found[block.path, number, "out"] = ffn.before, ffn.after
    return found


def check_state(key: Key, state: Tensor) -> None:
    """Raise `PpclError` unless a stream's state is ``[batch, tokens, channels]``."""
    if state.ndim != 3:
        raise PpclError(
            f"stack {key[0]}: the {key[1]} stream is of shape {tuple(state.shape)}, not "
            "[batch, tokens, channels]; such a model cannot be analysed"
        )
