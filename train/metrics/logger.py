"""The metrics logger: what each step cost and gave, as lines of JSON, as TensorBoard events, and for display."""

from __future__ import annotations

import datetime
import json
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import write_text
from ppcl_fx.io.reading import INDEX_BYTES, append_regular, read_bytes

LOG = "log.jsonl"
EVENTS = "tensorboard"
WINDOW = 50  # steps that rates and the estimate of the end are taken over
ENOUGH = 3  # measured steps before there is an estimate
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_log = logging.getLogger("ppcl_fx.train")


@dataclass(frozen=True)
class LogRow:
    """One step, as it is logged and shown; tables are by edit id, rates over the last steps (None at first)."""

    stage: str
    step: int  # steps of the stage that are done
    steps: int
    loss: float  # sum of the losses
    losses: dict[str, float]
    lr: float
    norms: dict[str, float]  # of the gradients before clipping
    held_out: dict[str, float]  # mean losses on the held-out calls, where an evaluation followed
    score: float | None  # what the score callback gave then
    stopped: dict[str, str]  # why a student stopped after this step
    seconds: float  # of the step alone, without evaluation and checkpoint
    samples_per_second: float | None  # evaluations and checkpoints included
    flops_per_second: float | None  # of matrix products and attention, likewise
    peak_bytes: int  # allocated so far on the GPU; on the CPU of the whole process
    left: float | None  # seconds to the end of the stage


Show = Callable[[LogRow], None]


class MetricsLogger:
    """Follows one run. Raises PpclError where events are asked for and TensorBoard is not installed."""

    def __init__(
        self,
        folder: Path | None = None,  # of ``log.jsonl`` and the events; None to write nothing
        device: torch.device | None = None,  # whose memory counts
        *,
        log_every: int = 1,  # steps between lines and events; evaluations and stops always have one
        tensorboard: bool | None = None,  # None: where TensorBoard is installed
        show: Show | None = None,  # told each step's row
        count: bool = True,  # operations; what counts would keep blocks from being compiled
        clock: Callable[[], float] = time.perf_counter,  # never goes back, as a computer's time may
    ) -> None:
        self._folder, self._every, self._show, self.clock = folder, log_every, show, clock
        self._device, self._count = device or torch.device("cpu"), count
        self._writer_class = None if folder is None else _tensorboard(tensorboard)
        self._events: Any = None
        self._failed = False
        self._stage, self._total = "", 0
        self._flops: float | None = None
        self._begin_rates()

    def begin(self, stage: str, done: int, total: int) -> None:
        """Start a stage, or go on with it after `done` steps: lines of later steps are lost work and go."""
        self._stage, self._total = stage, total
        self._begin_rates()
        if self._folder is None:
            return
        with self._unless_full():
            _forget(self._folder / LOG, stage, done)
        if self._writer_class is not None:
            self.close()
            with self._unless_full():
                self._events = self._writer_class(str(self._folder / EVENTS / stage), purge_step=done + 1)

    def _begin_rates(self) -> None:
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._mean: float | None = None
        self._last: float | None = None
        self._flops = None
        self._counted, self._samples, self._began = 0, 0, self.clock()

    def close(self) -> None:
        """Finish the events' file."""
        if self._events is not None:
            with self._unless_full():
                self._events.close()
            self._events = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step's forward and backward passes inside; the first one's operations are counted."""
        self._began = self.clock()
        if self._flops is None and self._count:
            with Counter() as counter:
                yield
            self._counted = counter.total
        else:
            yield

    def changed(self) -> None:
        """The next step computes something else than the last one: count again, and measure its rate anew."""
        self._flops = None
        self._times.clear()

    def stepped(self, samples: int) -> float:
        """Note that the step with so many samples is done; return its seconds."""
        if self._flops is None and self._count:
            self._flops = float(self._counted) / max(1, samples)
        self._samples = samples
        return self.clock() - self._began

    def row(self, step: int, seconds: float, *, losses: dict[str, float], **facts: Any) -> None:
        """Tell of a step that is done, its evaluation included; `facts` are what else `LogRow` takes."""
        now = self.clock()
        if self._last is not None:
            # From the end of the step before, so checkpoints count; the first one warms up and does not.
            self._times.append(max(now - self._last, 1e-9))
        self._last = now
        if len(self._times) >= ENOUGH:
            self._mean = sum(self._times) / len(self._times)
        mean, flops = self._mean, self._flops
        row = LogRow(
            stage=self._stage,
            step=step,
            steps=self._total,
            loss=sum(losses.values()),
            losses=losses,
            seconds=seconds,
            samples_per_second=None if mean is None else self._samples / mean,
            flops_per_second=None if mean is None or not flops else flops * self._samples / mean,
            peak_bytes=peak_bytes(self._device),
            left=None if mean is None else mean * (self._total - step),
            **facts,
        )
        if step % self._every == 0 or step == self._total or row.held_out or row.stopped:
            self._write(row)
        if self._show is not None:
            self._show(row)

    def _write(self, row: LogRow) -> None:
        if self._folder is None:
            return
        found = {name: value for name, value in asdict(row).items() if value not in (None, {})}
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._unless_full():
            self._folder.mkdir(parents=True, exist_ok=True)
            with append_regular(self._folder / LOG) as file:
                file.write((json.dumps({"time": stamp, **found}, ensure_ascii=False) + "\n").encode())
        if self._events is not None:
            with self._unless_full():
                for name, value in _scalars(row):
                    self._events.add_scalar(f"{row.stage}/{name}", value, row.step)

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        """A log that cannot be written is no reason to lose the run; it is said once."""
        try:
            yield
        except (OSError, PpclError) as error:
            if not self._failed:
                _log.warning("%s: the log cannot be written (%s); training goes on", self._folder, error)
            self._failed = True


def peak_bytes(device: torch.device) -> int:
    """Return the most memory so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _scalars(row: LogRow) -> Iterator[tuple[str, float]]:
    for table, values in (("held_out", row.held_out), ("gradient_norm", row.norms), ("loss", row.losses)):
        for name, value in values.items():
            yield f"{table}/{name}", value
    for name, number in (
        ("loss/sum", row.loss),
        ("lr", row.lr),
        ("score", row.score),
        ("speed/samples_per_second", row.samples_per_second),
        ("speed/flops_per_second", row.flops_per_second),
        ("memory/peak_bytes", row.peak_bytes),
    ):
        if number is not None:
            yield name, float(number)


def _forget(path: Path, stage: str, done: int) -> None:
    """Drop the lines of `stage` after step `done`, and a line that a killed run left half-written."""
    if not path.is_file():
        return
    kept = []
    for line in read_bytes(path, INDEX_BYTES).decode("utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(line)
            if found["stage"] != stage or found["step"] <= done:
                kept.append(line)
    write_text(path, "".join(kept))


def _tensorboard(wanted: bool | None) -> Any:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter
    except ImportError as error:
        if wanted is None:
            return None
        reason = f"TensorBoard is not here ({error}); pip install 'ppcl-fx[train]'"
        raise PpclError(f"training option tensorboard: {reason}") from None


class Counter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside; every operation runs as it would outside, to the bit.

    PyTorch's own counter also follows modules, which a backward pass in the middle of a graph confuses; and it does
    not know the CPU's attention. In `total` a multiplication with an addition is two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet.__name__ == _CPU:
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet.__name__ == f"{_CPU}_backward":
            # The gradient of the output comes first.
            self.total += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        return out
