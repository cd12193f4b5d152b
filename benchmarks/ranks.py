"""Interval parallelism: a step of stage "depth" on several processes over the same step on one, a thread each.

    python -m benchmarks.ranks

The shipped shapes model, its sixteen blocks in four intervals, recorded calls of sixteen samples. Everything goes
through `ppcl_fx.train`, so a step has all that a user's step has; processes talk over gloo. A processor of its own for
each process is needed for the numbers to mean anything.

"bound" is what the division of the work would give if nothing but the graph's multiplications took time: a rank runs
the teacher as far as its last interval, so the ranks do some of the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, write
from benchmarks.trace import STACK
from ppcl_fx.io.files import read_json, write_json
from ppcl_fx.schema.curves import Losses
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.train import train
from ppcl_fx.train.core.distillation_graph import distil, train_only
from ppcl_fx.train.distributed.edit_parallel import assign, division_cost
from ppcl_fx.train.distributed.process_group import joined

INTERVALS = ((2, 4), (5, 7), (8, 10), (11, 13))
PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a yellow circle")
WARM = 3
"""Steps before the clock counts."""


def prepare(folder: Path, samples: int) -> None:
    """Record calls of `samples` samples."""
    pipeline = shapes_pipeline()
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(samples)]
    ppcl_fx.record(pipeline, texts, batch_size=samples, seed=0).save(folder / "calls")


def pluggable(folder: Path) -> tuple[Any, Any]:
    """Return the pluggable model and the calls."""
    calls = ppcl_fx.Calls.open(folder / "calls")
    gm = ppcl_fx.trace(load_pipeline().transformer, calls.examples())
    edits = [DepthEdit(stack=STACK, first=first, last=last) for first, last in INTERVALS]
    return ppcl_fx.rewrite(gm, Plan(edits=list(edits))), calls


def work(folder: Path, steps: int) -> None:
    """One process's part; rank 0 writes the seconds of each step."""
    torch.set_num_threads(1)
    with joined() as ranks:
        model, calls = pluggable(folder)
        times: list[float] = []
        out = folder / f"run-{ranks.world}"
        train(
            model,
            calls,
            stages=["depth"],
            steps=[steps + WARM],
            out=out,
            batch=1,
            every=steps + WARM + 1,
            tensorboard=False,
            progress=lambda *_: times.append(time.perf_counter()),
        )
        if ranks.first:
            # The last step's checkpoint is written before it is told of.
            seconds = [round(b - a, 5) for a, b in zip(times[WARM - 1 :], times[WARM:-1], strict=False)]
            write_json(folder / f"seconds-{ranks.world}.json", {"seconds": seconds})


def launch(folder: Path, world: int, steps: int) -> list[float]:
    """Run `world` processes and return the seconds of each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.ranks", "--work", str(folder), "--steps", str(steps)]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a process of {world} failed")
    found: list[float] = json.loads((folder / f"seconds-{world}.json").read_text())["seconds"]
    return found


def bound(folder: Path, worlds: Sequence[int]) -> dict[int, float]:
    """Return, for each number of processes, how many times quicker a step could be by its multiplications."""
    model, _ = pluggable(folder)
    train_only(model, "depth")
    graph = distil(model, "depth")
    costs = {world: division_cost(graph, assign(graph, world)) for world in (1, *worlds)}
    return {world: round(costs[1] / costs[world], 3) for world in worlds}


def measure(worlds: Sequence[int], steps: int, samples: int) -> dict[str, Any]:
    """Return the seconds of a step for each number of processes, and the quotients."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, samples)
        bounds = bound(folder, worlds)
        runs: dict[str, Any] = {}
        losses = {}
        for world in (1, *worlds):
            seconds = launch(folder, world, steps)
            runs[str(world)] = {
                "median": round(statistics.median(seconds), 5),
                "least": min(seconds),
                "steps": len(seconds),
            }
            losses[world] = read_json(folder / f"run-{world}" / "losses.json", Losses).stages[0].losses
    one = runs["1"]["median"]
    for world in worlds:
        runs[str(world)] |= {
            "times_quicker": round(one / runs[str(world)]["median"], 3),
            "bound": bounds[world],
            "losses_equal": losses[world] == losses[1],
        }
    return {"intervals": [list(interval) for interval in INTERVALS], "samples": samples, "processes": runs}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the result."""
    made = parser("ranks", __doc__, steps=(60, "measured steps"), samples=(16, "samples of a call"))
    made.add_argument("--worlds", type=int, nargs="+", default=[2], help="numbers of processes (default: 2)")
    made.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.work is not None:
        work(options.work, options.steps)
        return
    result = measure(options.worlds, options.steps, options.samples)
    for world, run in result["processes"].items():
        more = f"   {run['times_quicker']} x as quick, bound {run['bound']}" if world != "1" else ""
        print(f"{world} processes: {run['median'] * 1000:.1f} ms a step{more}")
    write("ranks", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
