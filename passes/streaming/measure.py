"""The measurement of `measure`, made with one block's weights in memory at a time; nothing of it is lost by a kill."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.calls import Calls
from ppcl_fx.files import need_room, read_safetensors, write_safetensors
from ppcl_fx.passes.curves import CurveSums
from ppcl_fx.passes.ffn_fit import RIDGE as FFN_RIDGE
from ppcl_fx.passes.held_out import Division, HeldOutFit
from ppcl_fx.passes.measure import (
    Measurement,
    StreamSite,
    all_ffn_sites,
    check_state,
    ffn_title,
    mirrored,
    rows_of,
    stream_sites,
)
from ppcl_fx.passes.probes import Fit, Projector
from ppcl_fx.passes.reservoir import Choice, groups
from ppcl_fx.passes.similarity import Curves
from ppcl_fx.passes.streaming.ledger import BlockResult, Ledger, Note, Shelf, read_shelf
from ppcl_fx.passes.streaming.runner import Read, Streamer
from ppcl_fx.passes.streaming.states import States
from ppcl_fx.passes.watch import Watch

if TYPE_CHECKING:
    from ppcl_fx.calls import Call

CHECKPOINT_SECONDS = 30.0
"""Time after which the calls' values are written even where memory holds them all."""


class Report(Protocol):
    """Called with the steps done, the steps in all, and what they are."""

    def __call__(self, done: int, total: int, label: str = "") -> None:
        """Show that `done` of `total` steps are done."""


def silent(done: int, total: int, label: str = "") -> None:
    """Report nothing."""


class StreamedMeasurement(Measurement):
    """What `measure` finds, from a run that goes block by block.

    Args:
        gm: the traced teacher; its parameters may be on the meta device.
        calls: recorded calls.
        ledger: where results go; a run goes on from what it holds.
        states: where the calls' values are kept between blocks.
        read: gives weights by name.
        release: called after each block: its weights are not needed any more.
        device: where to compute.
        report: told how far it is.
        checkpoint_seconds: how often the calls' values are written where memory holds them all;
            None for `CHECKPOINT_SECONDS`.
    """

    def __init__(
        self,
        gm: GraphModule,
        calls: Sequence[Call],
        ledger: Ledger,
        states: States,
        read: Read,
        *,
        release: Callable[[], None] = lambda: None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        report: Report = silent,
        checkpoint_seconds: float | None = None,
    ) -> None:
        self.division = Division(calls)
        super().__init__(
            gm, tuple(stream_sites(gm)), all_ffn_sites(gm), calls_used=len(calls), held_out=self.division.kind
        )
        self.ledger = ledger
        self._states = states
        self._device = device
        self._report = report
        self._collector = _Collector(self, ledger, device)
        self._calls = calls
        self._batches = [call.batch for call in (calls.heads() if isinstance(calls, Calls) else calls)]
        watches = self._collector.watches()
        others = {
            graph: Streamer(graph, mirrored(watches, gm, graph), read, states, device)
            for graph in (gm.meta["ppcl"].get("kinds") or {}).values()
        }
        self._streamer = Streamer(gm, watches, read, states, device, others=others)
        self._release = release
        self._every = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds

    @property
    def segments(self) -> int:
        """Number of segments of the graph."""
        return len(self._streamer.segments)

    def run(self, stop: int | None = None) -> None:
        """Run what is not done yet, up to segment `stop` (for tests: all of them by default).

        Raises:
            PpclError: a value is NaN or infinite, a call does not fit the trace, or the disk is full.
        """
        written = time.monotonic()
        # What a killed run wrote after its last full cut is of no use.
        self._states.forget_all_but(self.ledger.cut)
        for number in range(self.ledger.cut, self.segments if stop is None else stop):
            self._segment(number)
            last = number + 1 == self.segments
            if last or self._states.spilled(number + 1) or time.monotonic() - written >= self._every:
                self._states.flush(number + 1)
                self.ledger.finish(number + 1)
                self._states.forget_all_but(number + 1)
                written = time.monotonic()

    def _segment(self, number: int) -> None:
        segment = self._streamer.segments[number]
        total = self.segments * (len(self._calls) + 1)
        label = segment.label or "the first layers"

        def begin(position: int) -> None:
            self._collector.begin(position, self._batches[position])

        def shown(call: int, result: Any) -> None:
            self._report(number * (len(self._calls) + 1) + call + 1, total, label)

        with self._collector.segment(
            [watch for watches in segment.due.values() for watch in watches]
        ) as collected:
            self._streamer.run_segment(number, self._calls, begin=begin, end=shown)
            self._release()
            result, probes = collected()
        self.ledger.add(result, probes)
        self._report((number + 1) * (len(self._calls) + 1), total, label)

    # ---- what passes ask for -----------------------------------------------------------------------------------

    @property
    def samples_used(self) -> int:
        return len(self._collector.choice.kept())

    def fits(self, site: StreamSite, ridge: float, refine_steps: int) -> list[float]:
        self._require_options(ridge, refine_steps)
        return [self.ledger.fit(name) for name in self._names(site)]

    def energies(self, site: StreamSite) -> list[float]:
        return [self.ledger.energy(name) for name in self._names(site)]

    def few(self, site: StreamSite) -> str:
        return self.ledger.few(self._names(site)[0])

    def ffn_fits(self, ridge: float) -> list[Fit]:
        assert ridge == FFN_RIDGE, "feed-forwards were fitted with this ridge"
        return [self.ledger.ffn(position) for position in range(len(self.ffn))]

    def batches(self, site: StreamSite) -> Iterator[list[Tensor]]:
        position = self.streams.index(site)
        names = [_shelf_name(position, state) for state in range(len(site.outputs) + 1)]
        shelves = [read_shelf(self.ledger.shelf_path(name), self.ledger.shelf(name)) for name in names]
        kept = self._collector.choice.kept()
        for group in groups([tuple(shelves[0][sample].shape) for sample in kept], len(names)):
            chosen = [kept[i] for i in group]
            yield [torch.stack([shelf[sample] for sample in chosen]).to(self._device) for shelf in shelves]

    def curves(self, site: StreamSite, ridge: float, refine_steps: int) -> Curves:
        self._require_options(ridge, refine_steps)
        sums = CurveSums(len(site.outputs))
        path = self.ledger.curve_path(str(self.streams.index(site)))
        tensors = {
            f"{name}.{part}": tensor
            for name, average in (("cka", sums.surrogate), ("gap", sums.gap), ("heat", sums.heat))
            for part, tensor in zip(("sum", "count"), average.tensors(), strict=True)
        }
        done = 0
        if path.is_file():
            stored = read_safetensors(path)
            done = int(stored.pop("batches"))
            for name, tensor in stored.items():
                tensors[name].copy_(tensor)
        weights = [self.ledger.probe(name).weight for name in self._names(site)]
        probes = [Projector(weight.to(self._device)) for weight in weights]
        size = len(probes)
        for number, batch in enumerate(self.batches(site)):
            if number < done:
                continue
            pairs = 0

            def tick(more: int) -> None:
                nonlocal pairs
                pairs += more
                self._report(pairs, size * (size - 1) // 2, f"curves of {site.stack.name}, {site.stream}")

            sums.add(batch[1:], probes, tick)
            write_safetensors(path, {**tensors, "batches": torch.tensor(number + 1)})
        return sums.curves()

    def _names(self, site: StreamSite) -> list[str]:
        position = self.streams.index(site)
        return [_probe_name(position, block) for block in range(len(site.outputs))]

    def _require_options(self, ridge: float, refine_steps: int) -> None:
        identity = self.ledger.identity
        assert (ridge, refine_steps) == (identity.ridge, identity.refine_steps), (
            "probes were solved with these"
        )


def _probe_name(site: int, block: int) -> str:
    return f"{site}.{block}"


def _shelf_name(site: int, state: int) -> str:
    return f"{site}-{state}"


class _Solved(NamedTuple):
    """Errors, energies and words on few tokens of probes by name, error and cosine of feed-forwards by position, and
    the probes by name."""

    fits: dict[str, float]
    energies: dict[str, float]
    few: dict[str, str]
    ffn: dict[int, tuple[float, float]]
    probes: dict[str, Projector]


class _Collector:
    """Observers that sum, solve and keep, for the watches of one segment at a time."""

    def __init__(self, measurement: StreamedMeasurement, ledger: Ledger, device: torch.device) -> None:
        self._streams, self._ffn = measurement.streams, measurement.ffn
        self._ledger = ledger
        self.choice = Choice(ledger.identity.samples, ledger.identity.memory)
        for result in ledger.results:
            for note in result.notes:
                self.choice.note(note.call, note.batch, note.nbytes)
        self._call = self._batch = 0
        self._division = measurement.division
        self._probes: dict[Watch, tuple[str, HeldOutFit]] = {}
        self._projectors: dict[Watch, tuple[int, HeldOutFit]] = {}
        self._keeps: dict[Watch, _Shelving] = {}

    def watches(self) -> list[Watch]:
        """What to watch: each block's input with its output, each state alone, each feed-forward's two ends."""
        for number, site in enumerate(self._streams):
            states = (site.inputs[0], *site.outputs)
            for position, node in enumerate(states):
                # What a sample takes in all is known from its first state.
                sizes = len(states) if position == 0 else 0
                shelving = _Shelving(self, _shelf_name(number, position), site, sizes)
                self._keeps[Watch((node,), shelving.see)] = shelving
            for position, (before, after) in enumerate(zip(site.inputs, site.outputs, strict=True)):
                sums = HeldOutFit(site.title, self._division)
                self._probes[Watch((before, after), sums.add)] = (_probe_name(number, position), sums)
        for number, (_, ffn) in enumerate(self._ffn):
            sums = HeldOutFit(ffn_title(ffn), self._division, bias=True)
            self._projectors[Watch((ffn.before, ffn.after), sums.add)] = (number, sums)
        return [*self._keeps, *self._probes, *self._projectors]

    def begin(self, position: int, batch: int) -> None:
        """A call of so many samples starts."""
        self._call, self._batch = position, batch
        self._division.begin(position)

    @property
    def call(self) -> int:
        """Position of the call that runs."""
        return self._call

    @property
    def batch(self) -> int:
        """Samples of the call that runs."""
        return self._batch

    def shelf_path(self, name: str) -> Path:
        """The file that a shelf is written to."""
        return self._ledger.shelf_path(name)

    def segment(self, due: Sequence[Watch]) -> _Segment:
        """Open a segment in which these watches are served."""
        return _Segment(
            self, [self._keeps[watch] for watch in due if watch in self._keeps], partial(self._solve, due)
        )

    def _solve(self, due: Sequence[Watch]) -> _Solved:
        """Solve what the segment summed, and drop the sums."""
        identity = self._ledger.identity
        found = _Solved({}, {}, {}, {}, {})
        for watch in due:
            if watch in self._probes:
                name, sums = self._probes[watch]
                solved = sums.solve(identity.ridge, identity.refine_steps)
                found.fits[name], found.energies[name] = sums.error(solved), sums.energy
                found.few[name], found.probes[name] = sums.few, solved
                sums.clear()
            elif watch in self._projectors:
                number, sums = self._projectors[watch]
                fit = sums.fit(sums.solve(FFN_RIDGE))
                found.ffn[number] = (fit.error, fit.cosine)
                sums.clear()
        return found


class _Segment:
    """The shelves of one segment, open while it runs."""

    def __init__(
        self, collector: _Collector, shelvings: Sequence[_Shelving], solve: Callable[[], _Solved]
    ) -> None:
        self._shelvings = shelvings
        self._solve = solve

    def __enter__(self) -> Callable[[], tuple[BlockResult, dict[str, Projector]]]:
        for shelving in self._shelvings:
            shelving.open()
        return self._result

    def __exit__(self, *error: object) -> None:
        for shelving in self._shelvings:
            shelving.close()

    def _result(self) -> tuple[BlockResult, dict[str, Projector]]:
        found = self._solve()
        shelves = {shelving.name: shelving.shelf() for shelving in self._shelvings}
        notes = [note for shelving in self._shelvings for note in shelving.notes]
        numbers = {name: value for name, value in found._asdict().items() if name != "probes"}
        return BlockResult(**numbers, shelves=shelves, notes=notes), found.probes


class _Shelving:
    """Writes the kept samples of one node, one after the other."""

    def __init__(self, collector: _Collector, name: str, site: StreamSite, sizes: int) -> None:
        self._collector = collector
        self.name = name
        self._site = site
        self._sizes = sizes
        self._file: BinaryIO | None = None
        self._samples: list[tuple[int, int, int]] = []
        self._dtype, self._width = torch.float32, 0
        self.notes: list[Note] = []

    def open(self) -> None:
        """Start an empty file."""
        self._file = self._collector.shelf_path(self.name).open("wb")
        self._samples, self.notes = [], []

    def see(self, state: Tensor) -> None:
        """Keep those samples of a call's state that are chosen by what is known so far."""
        assert self._file is not None
        check_state(self._site.key, state)
        state = rows_of(state, self._collector.batch)
        call, choice = self._collector.call, self._collector.choice
        if self._sizes:
            nbytes = self._sizes * state[0].nbytes
            choice.note(call, len(state), nbytes)
            self.notes.append(Note(call=call, batch=len(state), nbytes=nbytes))
        self._dtype, self._width = state.dtype, state.shape[-1]
        for kept, row in choice.kept():
            if kept == call:
                plain = state[row].detach().to("cpu").contiguous()
                need_room(self._collector.shelf_path(self.name), plain.nbytes)
                self._file.write(plain.view(torch.uint8).numpy().data)
                self._samples.append((call, row, state.shape[1]))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def shelf(self) -> Shelf:
        """Flush the file to disk, and say what is in it."""
        assert self._file is not None
        sync(self._file)
        dtype = str(self._dtype).removeprefix("torch.")
        return Shelf(dtype=dtype, width=self._width, samples=self._samples)


def sync(file: BinaryIO) -> None:
    """Write everything of a file to the disk itself."""
    file.flush()
    os.fsync(file.fileno())
