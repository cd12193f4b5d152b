"""Several ranks in a test: processes that train together over gloo, and what each of them said."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.train import train
from ppcl_fx.train.distributed.process_group import joined
from tests.train.pluggable import build

Job = Callable[[Path, int], Any]
STEPS = {"depth": 4, "width": 3, "finetune": 4}
OPTIONS: dict[str, Any] = {"batch": 2, "lr": 3e-3, "every": 2, "ema": 0.9, "tensorboard": False}
SECONDS = 900.0
"""A test of ranks that hang must end."""


def trained(out: Path, **options: Any) -> dict[str, Any]:
    """Train the small Qwen-Image, or go on with it, and return curves and weights; the same on any number of ranks."""
    model, calls = build("qwen", options.pop("dtype", torch.float32))
    given = {"stages": list(STEPS), **OPTIONS, **options}
    result = train(model, calls, out=out, steps={name: STEPS[name] for name in given["stages"]}, **given)
    tuned = result.finetuned_model
    return {
        "curves": {stage.label: stage.losses for stage in result.stages},
        "held_out": {stage.label: stage.held_out for stage in result.stages},
        "students": {name: p.detach().clone() for name, p in model.students_module.named_parameters()},
        "tuned": None if tuned is None else {name: p.detach().clone() for name, p in tuned.named_parameters()},
    }


def start(world: int, job: Job, folder: Path) -> list[tuple[int | None, str]]:
    """Run ``job(folder, rank)`` on `world` ranks; return each one's exit code, and its line where it was refused.

    What a job returns is put into ``<job>-<world>-<rank>.pt`` in the folder.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.warm"])  # imports and the model's trace: once for all ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(rank, world, port, job, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    said = [folder / f"said-{rank}.json" for rank in range(world)]
    lines = [str(json.loads(path.read_text())) if path.is_file() else "" for path in said]
    return [(process.exitcode, line) for process, line in zip(processes, lines, strict=True)]


def result(folder: Path, job: Job, world: int, rank: int = 0) -> Any:
    """Return what a job returned on a rank."""
    return torch.load(folder / f"{job.__name__}-{world}-{rank}.pt", weights_only=True)


def _rank(rank: int, world: int, port: int, job: Job, folder: Path) -> None:
    torch.set_num_threads(1)
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()}, MASTER_ADDR="127.0.0.1")
    said = folder / f"said-{rank}.json"
    said.unlink(missing_ok=True)
    try:
        with joined(timeout=120):
            torch.save(job(folder, rank), folder / f"{job.__name__}-{world}-{rank}.pt")
    except PpclError as error:
        said.write_text(json.dumps(str(error)))
        sys.exit(2)
