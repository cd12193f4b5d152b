"""SIGKILL at random moments: the run that was killed ends where the one that never was does, to the bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from ppcl_fx.io.files import read_safetensors
from ppcl_fx.train import Losses
from tests.train.killed import RESULT, work

pytestmark = pytest.mark.kill

KILLS = 4
PATIENCE = 600.0


def _begin(context: ForkServerContext, out: Path) -> BaseProcess:
    """Start a process and return when it is about to train."""
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(out, tell))
    process.start()
    assert hear.poll(PATIENCE)
    assert hear.recv() == "ready"
    return process


def test_a_training_killed_at_random_moments_ends_the_same_to_the_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.killed"])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = _begin(context, straight)
    began = time.monotonic()
    process.join(PATIENCE)
    span = time.monotonic() - began
    assert process.exitcode == 0

    moments, kills = random.Random(4), 0
    while kills < KILLS:
        process = _begin(context, killed)
        process.join(moments.uniform(0.0, 0.4) * span)
        if process.exitcode is not None:
            break  # this machine was quicker now than before
        process.kill()
        process.join(PATIENCE)
        kills += 1
    assert kills > 0
    process = _begin(context, killed)
    process.join(PATIENCE)
    assert process.exitcode == 0

    for name in (RESULT, "finetuned/model.safetensors"):
        one, two = (read_safetensors(folder / name) for folder in (straight, killed))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = (Losses.open(folder / "losses.json") for folder in (straight, killed))
    for one_stage, two_stage in zip(first.stages, second.stages, strict=True):
        assert one_stage.model_copy(update={"seconds": 0.0}) == two_stage.model_copy(update={"seconds": 0.0})
    steps = [
        [
            (row["stage"], row["step"])
            for row in map(json.loads, (folder / "logs" / "log.jsonl").read_text().splitlines())
        ]
        for folder in (straight, killed)
    ]
    assert steps[0] == steps[1]
