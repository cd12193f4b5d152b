"""Calibration: the teacher runs once on each call, and gives all that the analysis passes need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.partition import Watch
from ppcl_fx.passes.analysis.curves import Curves, CurveSums
from ppcl_fx.passes.analysis.probes import Fit, Projector
from ppcl_fx.passes.analysis.stream_sites import StreamSite, all_ffn_sites, mirrored, rows_of, stream_sites
from ppcl_fx.passes.calibration.held_out import Division, HeldOutFit
from ppcl_fx.passes.calibration.reservoir import Reservoir, groups
from ppcl_fx.passes.calibration.run_store import MEMORY, CalibrationResult, Note, RunStore, Shelf
from ppcl_fx.passes.options import AnalyzeConfig

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call

FFN_RIDGE = 1e-6
"""Ridge of the feed-forwards' fits."""

CHECKPOINT_SECONDS = 30.0
"""Time after which the calls' values are written even where memory holds them all."""

Progress = Callable[[int, int], None]
"""Called with the number of calls done and the number of all."""


class Notify(Protocol):
    """Called with the steps done, the steps in all, and what they are."""

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Show that `done` of `total` steps are done."""


def silent(done: int, total: int, label: str = "") -> None:
    """Report nothing."""


class Calibration:
    """What the analysis passes ask of the teacher: solved probes and their fits, kept samples, curves.

    With all in memory the calls run one after the other; with values kept between segments, block by block, and each
    block's sums are solved and dropped when it is done. The results are the same, to the bit.

    Args:
        gm: the traced teacher. It is not changed.
        calls: recorded calls. Every token of every call is a sample of the probes.
        config: its ``samples``, ``ridge`` and ``refine_steps`` count.
        memory: bytes of activations kept for CKA, at most.
        residency: where weights and values are; all in memory if left out.
        store: where results go; a run goes on from what it holds. In memory if left out.
        report: told how far it is.

    Attributes: the `streams` of every stack, every feed-forward with its block (`ffn`), how many calls run
    (`calls_used`) and what of them fits are judged on (`held_out`).

    Raises:
        PpclError: there are no calls, or the model has no blocks.
    """

    def __init__(
        self,
        gm: GraphModule,
        calls: Sequence[Call],
        config: AnalyzeConfig,
        memory: int = MEMORY,
        residency: Residency | None = None,
        store: RunStore | None = None,
        report: Notify = silent,
    ) -> None:
        check_request(calls)
        self.gm, self.store = gm, store or RunStore()
        self.streams, self.ffn = tuple(stream_sites(gm)), all_ffn_sites(gm)
        self._calls, self._config, self._report = calls, config, report
        self._batches = [call.batch for call in (calls.heads() if isinstance(calls, Calls) else calls)]
        self._division = Division(calls)
        self.calls_used, self.held_out = len(calls), self._division.kind
        self._reservoir = Reservoir(config.samples, memory)
        for note in self.store.found.notes:
            self._reservoir.note(note.call, note.batch, note.nbytes)
        self._call, self._notes = 0, list[Note]()
        self._shelves: dict[Watch, tuple[str, Shelf]] = {}
        self._fits: dict[Watch, tuple[str | int, HeldOutFit]] = {}  # of probes by name, of feed-forwards by number
        self._watch()
        watches = [*self._shelves, *self._fits]
        self.executor = Executor(gm, lambda graph: mirrored(watches, gm, graph), residency)

    def _watch(self) -> None:
        """Watch each state alone, each block's input with its output, and each feed-forward's two ends."""
        for number, site in enumerate(self.streams):
            states = (site.inputs[0], *site.outputs)
            for position, node in enumerate(states):
                name = f"{number}-{position}"
                shelf = self.store.shelf(name)
                # What a sample takes in all is known from its first state.
                see = partial(self._see, shelf, site, len(states) if position == 0 else 0)
                self._shelves[Watch((node,), see)] = name, shelf
        for number, site in enumerate(self.streams):
            for position, ends in enumerate(zip(site.inputs, site.outputs, strict=True)):
                sums = HeldOutFit(site.title, self._division)
                self._fits[Watch(ends, sums.add)] = f"{number}.{position}", sums
        for number, (_, ffn) in enumerate(self.ffn):
            sums = HeldOutFit(f"{ffn.block}, {ffn.stream} feed-forward", self._division, bias=True)
            self._fits[Watch((ffn.before, ffn.after), sums.add)] = number, sums

    def run(self, stop: int | None = None) -> Calibration:
        """Run what is not done yet, up to sweep `stop` (all by default), and return this. Raises `PpclError`: a value
        is NaN or infinite, a call does not fit the trace, or the disk is full.
        """
        values, sweeps = self.executor.residency.values, self.executor.sweeps
        written = time.monotonic()
        if values is not None:
            # What a killed run wrote after its last full cut is of no use.
            values.forget_all_but(self.store.cut)
        for sweep in sweeps[self.store.cut : stop]:
            self._sweep(sweep, len(sweeps))
            if values is None:
                continue
            if sweep is sweeps[-1] or values.spilled(sweep.stop) or time.monotonic() - written >= CHECKPOINT_SECONDS:
                values.flush(sweep.stop)
                self.store.finish(sweep.stop)
                values.forget_all_but(sweep.stop)
                written = time.monotonic()
        return self

    def _sweep(self, sweep: range, count: int) -> None:
        segments = self.executor.segments[sweep.start : sweep.stop]
        # Where there are several, solving what a sweep summed is a step too.
        steps, label = len(self._calls), ""
        if count > 1:
            steps, label = steps + 1, segments[0].label or "the first layers"

        def begin(position: int) -> None:
            self._call = position
            self._division.begin(position)

        def shown(call: int, result: Any) -> None:
            self._report(sweep.start * steps + call + 1, count * steps, label)

        due = [watch for segment in segments for watches in segment.due.values() for watch in watches]
        self._notes = []
        with ExitStack() as stack:
            for watch in due:
                if watch in self._shelves:
                    stack.enter_context(self._shelves[watch][1].opened())
            self.executor.run(sweep, (call.kwargs for call in self._calls), begin, shown)
            self.store.add(*self._solved(due))
        if count > 1:
            self._report((sweep.start + 1) * steps, count * steps, label)

    def _see(self, shelf: Shelf, site: StreamSite, states: int, state: Tensor) -> None:
        """Keep those samples of a call's state that are chosen by what is known so far."""
        state = rows_of(site.checked(state), self._batches[self._call])
        if states:
            note = Note(call=self._call, batch=len(state), nbytes=states * state[0].nbytes)
            self._notes.append(note)
            for sample in self._reservoir.note(note.call, note.batch, note.nbytes):
                for _, other in self._shelves.values():
                    other.drop(sample)
        for row in range(len(state)):
            if (self._call, row) in self._reservoir:
                shelf.add((self._call, row), state[row])

    def _solved(self, due: Sequence[Watch]) -> tuple[CalibrationResult, dict[str, Tensor]]:
        """Solve what the sweep summed, drop the sums, and return what it gave, with the probes."""
        found, probes = CalibrationResult(notes=self._notes), dict[str, Tensor]()
        for watch in due:
            if watch in self._shelves:
                kept, shelf = self._shelves[watch]
                found.shelves[kept] = shelf.content()
                continue
            name, sums = self._fits[watch]
            if isinstance(name, int):
                found.ffn[name] = sums.fit(sums.solve(FFN_RIDGE))
            else:
                solved = sums.solve(self._config.ridge, self._config.refine_steps)
                found.fits[name], found.energies[name], found.few[name] = sums.error(solved), sums.energy, sums.few
                probes[name] = solved.weight
            sums.clear()
        return found, probes

    # ---- what passes ask for -----------------------------------------------------------------------------------

    @property
    def samples_used(self) -> int:
        """How many samples the curves average over."""
        return len(self._reservoir.kept())

    def probes(self, site: StreamSite) -> list[Projector]:
        """The solved probe of each block (Eq. 1, refined by Eq. 2), where the curves are computed."""
        device = self.executor.residency.device
        return [Projector(self.store.probe(name).to(device)) for name in self._names(site)]

    def fits(self, site: StreamSite) -> list[tuple[float, float]]:
        """For each block its probe's relative squared error on what was held out, and its output's energy."""
        found = self.store.found
        return [(found.fits[name], found.energies[name]) for name in self._names(site)]

    def few(self, site: StreamSite) -> str:
        """What to say where the probes of a stream were solved from few tokens; else nothing."""
        return self.store.found.few[self._names(site)[0]]

    def ffn_fits(self) -> list[Fit]:
        """How well a projector stands in for each feed-forward of `ffn`."""
        return [Fit(*self.store.found.ffn[position]) for position in range(len(self.ffn))]

    def batches(self, site: StreamSite) -> Iterator[list[Tensor]]:
        """The kept samples of a stream in batches of one shape: ``[B, T, D]`` before the stack and after each block."""
        position = self.streams.index(site)
        shelves = [self.store.kept(f"{position}-{state}") for state in range(len(site.outputs) + 1)]
        kept = self._reservoir.kept()
        for group in groups([tuple(shelves[0][sample].shape) for sample in kept], len(shelves)):
            states = (torch.stack([shelf[kept[i]] for i in group]) for shelf in shelves)
            yield [state.to(self.executor.residency.device) for state in states]

    def curves(self, site: StreamSite) -> Curves:
        """CKA and gap curves and the heatmap over the kept samples; what the store has is not done again."""
        sums, stream = CurveSums(len(site.outputs)), str(self.streams.index(site))
        done = self.store.load_curves(stream, sums.tensors())
        probes, label = self.probes(site), f"curves of {site.stack.name}, {site.stream}"
        whole = len(probes) * (len(probes) - 1) // 2
        for number, batch in enumerate(self.batches(site)):
            if number >= done:
                sums.add(batch[1:], probes, lambda pairs: self._report(pairs, whole, label))
                self.store.save_curves(stream, sums.tensors(), number + 1)
        return sums.curves()

    def _names(self, site: StreamSite) -> list[str]:
        return [f"{self.streams.index(site)}.{block}" for block in range(len(site.outputs))]


def calibrate(
    gm: GraphModule,
    calls: Sequence[Call],
    config: AnalyzeConfig | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Calibration:
    """Run the teacher once on each call, all in memory, and return the calibration; `progress` is called after each.
    Raises `PpclError`: as `Calibration`, or a value is NaN or infinite.
    """

    def report(done: int, total: int, label: str = "") -> None:
        if progress is not None and not label:  # not of curves
            progress(done, total)

    return Calibration(gm, calls, config or AnalyzeConfig(), memory, report=report).run()


def check_request(calls: Sequence[Call]) -> None:
    """Raise `PpclError` where there is nothing to measure."""
    if not len(calls):
        raise PpclError("there are no calls to analyse; record some first")
