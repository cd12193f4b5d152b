"""Kill a training of the shipped model at random moments, and compare its end with that of a run nobody killed.

    python -m benchmarks.kill --kills 20

The program is run as a user runs it, each time in a new process: ``ppcl-fx train ... --resume``. A kill is SIGKILL at a
moment drawn between the start of training and the end of the run, by a fixed seed. Checkpoints are written at every
second step, so that many kills fall into one. Equal means: the same bytes in every weight and every loss.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ppcl_fx
from benchmarks.clock import parser, write
from benchmarks.trace import STACK
from ppcl_fx.io.files import read_safetensors
from ppcl_fx.schema.curves import Losses
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.shapes import load_pipeline

PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square"]
OPTIONS = [
    "--steps", "40,20,20", "--batch", "1", "--accumulate", "2", "--ema", "0.9", "--held-out", "0.2",
    "--evaluate-every", "10", "--every", "2", "--no-tensorboard",
]  # fmt: skip
WAIT = 1800.0


def prepare(folder: Path) -> None:
    """Write a student of the shipped model and recorded calls."""
    pipeline = load_pipeline()
    calls = ppcl_fx.record(pipeline, PROMPTS, num_inference_steps=4, batch_size=1)
    calls.save(folder / "calls")
    gm = ppcl_fx.trace(pipeline.transformer, calls.examples())
    edits = [DepthEdit(stack=STACK, first=3, last=5), DepthEdit(stack=STACK, first=8, last=9)]
    plan = Plan(model=calls.model, edits=[*edits, FfnEdit(stack=STACK, block=12)])
    ppcl_fx.rewrite(gm, plan).save(folder / "straight")
    shutil.copytree(folder / "straight", folder / "killed")


def begin(folder: Path, student: str) -> subprocess.Popen[bytes]:
    """Start the program, and return once it trains (its log or its first checkpoint is there)."""
    arguments = ["train", str(folder / student), "--calls", str(folder / "calls"), "--resume", *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ppcl_fx", *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    file = folder / student / "train.toml"
    file.unlink(missing_ok=True)  # each start writes it anew, just before it trains
    deadline = time.monotonic() + WAIT
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run once without and once with `kills`; return what was seen."""
    prepare(folder)
    process = begin(folder, "straight")
    began = time.monotonic()
    if process.wait(WAIT) != 0:
        raise RuntimeError("the run that nobody kills failed")
    span = time.monotonic() - began
    moments, done = random.Random(seed), 0
    places: list[str] = []
    while done < kills:
        process = begin(folder, "killed")
        try:
            process.wait(moments.uniform(0.0, 2.0 * span / kills))
            break  # it came to its end before the kill
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        done += 1
        found = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("[0-9]*"))
        places.append(found[-1] if found else "none")
        print(f"kill {done}: newest checkpoint {places[-1]}", flush=True)
    if process.returncode != 0:
        process = begin(folder, "killed")
        if process.wait(WAIT) != 0:
            raise RuntimeError("the run that was killed could not be finished")
    return {"seconds": round(span, 2), "kills": done, "checkpoints_at_kills": places, "equal": equal(folder)}


def equal(folder: Path) -> bool:
    """Tell whether the two runs ended with the same bytes in all weights and losses."""
    for name in ("students.safetensors", "finetuned/model.safetensors"):
        one, two = (read_safetensors(folder / run / name) for run in ("straight", "killed"))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    runs = [Losses.open(folder / run / "losses.json").stages for run in ("straight", "killed")]
    plain = [[stage.model_copy(update={"seconds": 0.0}) for stage in stages] for stages in runs]
    return plain[0] == plain[1]


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    made = parser("kill", __doc__, kills=(20, "how often"), seed=(4, "decides the moments"))
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.kills, options.seed, Path(folder))
    print(f"{found['kills']} kills; the same to the bit: {found['equal']}")
    path = write("kill", options.out, found)
    if not found["equal"]:
        sys.exit(1)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
