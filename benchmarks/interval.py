"""Memory-bounded training of one interval of a full-size Qwen-Image (20.43 B parameters in bf16), on a CPU.

    python -m benchmarks.interval

Nothing is downloaded. The teacher is the synthetic checkpoint of `benchmarks.streaming`: one block of random weights,
hard-linked sixty times, with random inputs. The student folder is written by the streamed rewrite with one edit, the
interval [15, 24] of the paper's Eq. 13, and trained by `BoundedTraining`: the teacher is streamed up to block 24, its
states at the interval's borders are cached, and the student (bf16 weights, float32 masters, float32 AdamW moments) does
its steps from the cache.

The training runs in a process of its own. Peak memory is the largest RssAnon that /proc/self/status gave, asked every
20 ms, for the teacher's pass and for the steps apart. Memory-mapped weights are not in it; the largest RSS with them is
given too. Random weights say nothing of what is learnt: this measures memory and time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.clock import apart, parser, write
from benchmarks.streaming import PACKAGES, Peak, calls, config, described, make, opened
from benchmarks.trace import STACK
from ppcl_fx.calls.store import Calls
from ppcl_fx.io.files import need_room
from ppcl_fx.model.rewrite import rewrite_streamed
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.train.bounded.trainer import BoundedTraining
from ppcl_fx.train.config import Limits, TrainConfig

Result = dict[str, Any]


def student(scratch: Path, made: dict[str, Any], recorded: Calls, first: int, last: int) -> None:
    """Write the student folder: the interval's student begins as the block in its middle."""
    plan = Plan(edits=[DepthEdit(stack=STACK, first=first, last=last, init="middle")])
    rewrite_streamed(opened(scratch / "model", made), plan, scratch / "student", recorded, fit=None)


def train(scratch: Path, made: dict[str, Any], recorded: Calls, options: argparse.Namespace) -> Result:
    """Train the interval and return what it took."""
    ends: list[float] = []
    phases: dict[str, Peak] = {}

    def phase(name: str) -> None:
        if name not in phases:
            phases[name] = Peak()
            phases[name].start()

    def report(done: int, total: int, label: str) -> None:
        if label.startswith("running the teacher"):
            if done == total:
                phase("steps")
        else:
            ends.append(time.perf_counter())

    phase("whole")
    begin = time.perf_counter()
    training = BoundedTraining(
        StudentFolder.open(scratch / "student", opened(scratch / "model", made)),
        recorded,
        TrainConfig(
            stages=("depth",), steps=(options.steps,), batch=1, lr=1e-4, checkpointing=options.checkpointing
        ),
        Limits(memory=int(options.memory_gib * 2**30)),
    )
    lines = training.lines
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    result = None if options.dry_run else training.run(report)
    seconds = time.perf_counter() - begin
    peaks = {name: peak.result() for name, peak in phases.items()}
    found: Result = {"schedule": lines, "seconds": round(seconds, 1), "memory": peaks}
    if result is None:
        return found
    (curves,) = result.stages
    (losses,) = curves.losses.values()
    trained = (scratch / "student" / "students.safetensors").stat().st_size
    return {
        **found,
        "seconds_in_steps": round(curves.seconds, 1),
        "seconds_between_steps": [round(b - a, 1) for a, b in pairwise(ends)],
        "losses": losses,
        "student_bytes": trained,
        "student_params": trained // 2,
    }


def main(arguments: list[str] | None = None) -> Path | None:
    """Measure, print and write the result; return its path."""
    options = _options(arguments)
    made = config(options.blocks, options.heads)
    recorded = calls(options.calls, options.batch, options.side, options.text)
    if options.part:
        print(json.dumps(train(Path(options.scratch), made, recorded, options)))
        return None
    scratch = Path(tempfile.mkdtemp(prefix="ppcl-interval-", dir=options.scratch))
    try:
        need_room(scratch, 16 * 2**30 if options.heads >= 24 else 2**30)
        (scratch / "model").mkdir()
        make(scratch / "model", made)
        student(scratch, made, recorded, options.first, options.last)
        names = ("blocks", "heads", "calls", "batch", "side", "text", "first", "last", "steps", "memory-gib")
        flags = ["--checkpointing"] * options.checkpointing + ["--dry-run"] * options.dry_run
        found = apart("interval", options, names, "--part", "--scratch", str(scratch), *flags)
    finally:
        shutil.rmtree(scratch)
    result = {
        "interval": [options.first, options.last],
        "steps": options.steps,
        **described(options),
        "checkpointing": options.checkpointing,
        **found,
    }
    for name, peak in found["memory"].items():
        anonymous, resident = peak["peak_anonymous_gib"], peak["peak_resident_gib"]
        print(f"{name:<8} {anonymous:.2f} GiB anonymous, {resident:.2f} GiB resident")
    print(f"{found['seconds']} s in all, {found.get('seconds_in_steps')} s in {options.steps} steps")
    if options.dry_run:
        return None
    return write("interval", options.out, result, PACKAGES)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(
        "interval",
        __doc__,
        blocks=(60, "blocks"),
        heads=(24, "heads of 128 channels"),
        first=(15, "first block of the interval"),
        last=(24, "last block of the interval"),
        steps=(2, "optimiser steps"),
        calls=(2, "calls"),
        batch=(1, "samples in each call"),
        side=(16, "image tokens along one side"),
        text=(64, "text tokens"),
        memory_gib=(20.0, "the limit that is kept"),
    )
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    made.add_argument("--dry-run", action="store_true", help="only the schedule")
    made.add_argument("--scratch", default=None, help="folder for the checkpoint (default: the system's)")
    made.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    return made.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
