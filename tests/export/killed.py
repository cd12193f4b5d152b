"""A small student, and the program that exports it in a process of its own, to be killed."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import ppcl_fx
from ppcl_fx.cli.app import main
from ppcl_fx.export.onnx import assemble as stitching
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.tracing import trace
from tests import models

BLOCKS = "transformer_blocks"
KNOWN = stitching.Translations()


def save_student(folder: Path, scale: float = 1.0) -> Path:
    """Write a Qwen-Image of three blocks with a student for two of them; `scale` stands for training."""
    teacher, kwargs = models.tiny_qwen(blocks=3)
    edits = [DepthEdit(stack=BLOCKS, first=0, last=1), FfnEdit(stack=BLOCKS, block=2)]
    model = ppcl_fx.rewrite(trace(teacher, kwargs), Plan(edits=[*edits]))
    with torch.no_grad():
        for parameter in model.students_module.parameters():
            parameter.mul_(scale)
    return model.save(folder)


def command(student: Path, out: Path, *more: object, keep: str = "1.0,0.75") -> list[str]:
    """The command line that exports a student without reading a weight."""
    return [*map(str, ("export", student, "-o", out, "--keep", keep, "--memory-limit", "1k", *more))]


def remembered() -> None:
    """Use the translations of earlier exports, which gives the same graphs in less time."""
    stitching.Translations = lambda: KNOWN  # type: ignore[assignment, misc]


def work(arguments: list[str], tell: Connection) -> None:
    """Run the program; tells "ready" first."""
    torch.set_num_threads(1)
    remembered()
    tell.send("ready")
    os._exit(main(arguments))
