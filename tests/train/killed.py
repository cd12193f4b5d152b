"""A small training in a process of its own, to be killed. Importing this builds the model: forks begin at once."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ppcl_fx.io.files import write_safetensors
from ppcl_fx.train import train
from tests.train.pluggable import build

RESULT = "students.safetensors"
build()


def work(out: Path, tell: Connection) -> None:
    """Train with every kind of state that a checkpoint must hold; go on where an earlier process stopped."""
    torch.set_num_threads(1)
    model, calls = build()
    tell.send("ready")
    train(
        model, calls, out=out, resume=True, stages=["depth", "width", "finetune"], steps=[5, 3, 3], batch=1,
        accumulate=2, every=1, ema=0.9, held_out=0.2, evaluate_every=2, patience=2, min_gain=0.05, tensorboard=False,
    )  # fmt: skip
    write_safetensors(out / RESULT, dict(model.students_module.named_parameters()))
