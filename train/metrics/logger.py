"""The metrics logger: what each step cost and gave, as lines of JSON, as TensorBoard events, and for whoever shows it.

Durations come from a clock that no one can set, so a computer's time may jump.
"""

from __future__ import annotations

import datetime
import json
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
WINDOW = 50
"""Steps that rates and the estimate of the end are taken over."""
ENOUGH = 3
"""Measured steps before there is an estimate."""
_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_log = logging.getLogger("ppcl_fx.train")


@dataclass(frozen=True)
class LogRow:
    """One step, as it is logged and shown.

    Attributes:
        stage: The stage's label.
        step: Steps of the stage that are done.
        steps: Steps of the stage in all.
        loss: Sum of the losses.
        losses: Edit id -> loss.
        lr: The learning rate of the step.
        norms: Edit id -> norm of its gradients before clipping.
        held_out: Edit id -> mean loss on the held-out calls, where this step was followed by an evaluation.
        score: What the score callback gave then.
        stopped: Edit id -> why its student stopped after this step.
        seconds: Wall time of the step alone, without evaluation and checkpoint.
        samples_per_second: Over the last steps, evaluations and checkpoints included; None at first.
        flops_per_second: Operations of matrix products and attention in a second, likewise.
        peak_bytes: The most memory so far: on the GPU what was allocated, on the CPU of the whole process.
        left: Seconds to the end of the stage at the rate of the last steps; None at first.
    """

    stage: str
    step: int
    steps: int
    loss: float
    losses: dict[str, float]
    lr: float
    norms: dict[str, float]
    held_out: dict[str, float]
    score: float | None
    stopped: dict[str, str]
    seconds: float
    samples_per_second: float | None
    flops_per_second: float | None
    peak_bytes: int
    left: float | None


Show = Callable[[LogRow], None]


class MetricsLogger:
    """Follows one run.

    Args:
        folder: Where ``log.jsonl`` and the events go; None to write nothing.
        device: Whose memory counts.
        log_every: Steps between lines and events; evaluations and stops always have one.
        tensorboard: Write events; None: where TensorBoard is installed.
        show: Told each step's row.
        count: Count operations. Not where blocks are compiled: what counts would keep them from it.
        clock: Seconds, never going back.

    Raises:
        PpclError: Events are asked for and TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | None = None,
        *,
        log_every: int = 1,
        tensorboard: bool | None = None,
        show: Show | None = None,
        count: bool = True,
        clock: Callable[[], float] = time.perf_counter,
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
            place = self._folder / EVENTS / stage
            with self._unless_full():
                if done == 0 and place.is_dir():
                    for old in place.glob("events.out.tfevents.*"):
                        old.unlink()
                self._events = self._writer_class(str(place), purge_step=done + 1)

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

    def row(
        self,
        step: int,
        seconds: float,
        *,
        losses: dict[str, float],
        lr: float,
        norms: dict[str, float],
        held_out: dict[str, float],
        score: float | None,
        stopped: dict[str, str],
    ) -> None:
        """Tell of a step that is done, its evaluation included."""
        self._measure()
        mean, flops = self._mean, self._flops
        row = LogRow(
            stage=self._stage,
            step=step,
            steps=self._total,
            loss=sum(losses.values()),
            losses=losses,
            lr=lr,
            norms=norms,
            held_out=held_out,
            score=score,
            stopped=stopped,
            seconds=seconds,
            samples_per_second=None if mean is None else self._samples / mean,
            flops_per_second=None if mean is None or not flops else flops * self._samples / mean,
            peak_bytes=peak_bytes(self._device),
            left=None if mean is None else mean * (self._total - step),
        )
        if step % self._every == 0 or step == self._total or row.held_out or row.stopped:
            self._write(row)
        if self._show is not None:
            self._show(row)

    def _begin_rates(self) -> None:
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._mean: float | None = None
        self._last: float | None = None
        self._flops = None
        self._counted, self._samples, self._began = 0, 0, self.clock()

    def _measure(self) -> None:
        """A step's time goes from the end of the one before to its own end, so checkpoints count; the first
        one warms up and does not.
        """
        now = self.clock()
        if self._last is not None:
            self._times.append(max(now - self._last, 1e-9))
        self._last = now
        if len(self._times) >= ENOUGH:
            self._mean = sum(self._times) / len(self._times)

    def _write(self, row: LogRow) -> None:
        if self._folder is None:
            return
        with self._unless_full():
            self._folder.mkdir(parents=True, exist_ok=True)
            with append_regular(self._folder / LOG) as file:
                file.write(_line(row).encode())
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


def _line(row: LogRow) -> str:
    found = {name: value for name, value in asdict(row).items() if value not in (None, {})}
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"time": stamp, **found}, ensure_ascii=False) + "\n"


def _scalars(row: LogRow) -> Iterator[tuple[str, float]]:
    tables: Mapping[str, Mapping[str, float]] = {
        "loss": {"sum": row.loss, **row.losses}, "held_out": row.held_out, "gradient_norm": row.norms,
    }  # fmt: skip
    for table, values in tables.items():
        for name, value in values.items():
            yield f"{table}/{name}", value
    single = {
        "lr": row.lr,
        "score": row.score,
        "speed/samples_per_second": row.samples_per_second,
        "speed/flops_per_second": row.flops_per_second,
        "memory/peak_bytes": float(row.peak_bytes),
    }
    for name, number in single.items():
        if number is not None:
            yield name, number


def _forget(path: Path, stage: str, done: int) -> None:
    """Drop the lines of `stage` after step `done`, and a line that a killed run left half-written."""
    if not path.is_file():
        return
    lines = read_bytes(path, INDEX_BYTES).decode("utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _stays(line, stage, done)]
    write_text(path, "".join(kept))


def _stays(line: str, stage: str, done: int) -> bool:
    try:
        found = json.loads(line)
        return bool(found["stage"] != stage or found["step"] <= done)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _tensorboard(wanted: bool | None) -> Any:
    """Return the class that writes events, or None."""
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted is None:
            return None
        raise PpclError(
            f"training option tensorboard: TensorBoard is not here ({error}); pip install 'ppcl-fx[train]'"
        ) from None
    return SummaryWriter


class Counter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside; every operation runs as it would outside, to the bit.

    PyTorch's own counter also follows modules, which a backward pass in the middle of a graph confuses; and it does
    not know the CPU's attention.

    Attributes:
        total: Operations so far; a multiplication with an addition is two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet.__name__ == _CPU:
            self.total += sdpa_flop_count(*_shapes(args[:3]))
        elif packet.__name__ == f"{_CPU}_backward":
            # The gradient of the output comes first.
            self.total += sdpa_backward_flop_count(*_shapes(args[:4]))
        return out


def _shapes(tensors: tuple[Any, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
