"""A small teacher that draws, a pluggable model of it, and trainings on prompts and pictures on any number of ranks."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import ppcl_fx
from ppcl_fx.calls.record import first_call
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.train import train
from ppcl_fx.train.data.prompts import PromptSource, Recording
from ppcl_fx.train.distributed.process_group import Place
from ppcl_fx.train.images.encode import Encoder
from ppcl_fx.train.images.images import ImageSource, open_images
from tests.shapes_folder import save_pipeline

BLOCKS, BATCH, SEED = 4, 3, 0
PROMPTS = ["a red circle", "a blue square", "two red circles", "a green circle", "a red square"]
_STACK = "transformer_blocks"


@functools.cache
def teacher() -> ShapesPipeline:
    """Return a small random pipeline in pixel space."""
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(Path(folder), blocks=BLOCKS)
        loaded: ShapesPipeline = ShapesPipeline.from_pretrained(folder)
    return loaded


@functools.cache
def _pluggable() -> Any:
    transformer = teacher().transformer
    edits = [DepthEdit(stack=_STACK, first=first, last=first + 1) for first in (0, 2)]
    traced = ppcl_fx.trace(copy.deepcopy(transformer), first_call(teacher(), PROMPTS[0]).kwargs)
    return ppcl_fx.rewrite(traced, Plan(model=fingerprint(transformer), edits=edits))


def prompts(folder: Path, **how: Any) -> PromptSource:
    """Two parts, of four prompts and of one; two calls a prompt: batches of 3, 3, 2, 2 calls."""
    recording = Recording(part=4, arguments={"num_inference_steps": 2, "guidance_scale": 1.0})
    return PromptSource(teacher(), PROMPTS, folder, BATCH, SEED, Place(**how), recording)


def pictures(root: Path, **how: Any) -> ImageSource:
    """The pictures of ``root/data``, with the cache beside them."""
    return open_images(Encoder(teacher()), root / "data", root / "cache", BATCH, SEED, **how)


def trained(source: Any, out: Path, stages: list[str], **options: Any) -> dict[str, Any]:
    """Train for four steps a stage, or go on; return curves and weights."""
    model = copy.deepcopy(_pluggable())
    given = {"batch": BATCH, "lr": 3e-3, "every": 2, "tensorboard": False, "seed": SEED, **options}
    result = train(model, source, out=out, stages=stages, steps=[4] * len(stages), **given)
    tuned = result.finetuned_model
    return {
        "curves": {stage.label: stage.losses for stage in result.stages},
        "students": {name: p.detach().clone() for name, p in model.students_module.named_parameters()},
        "tuned": None if tuned is None else {name: p.detach().clone() for name, p in tuned.named_parameters()},
    }


def warm() -> None:
    """Make what every rank needs before the ranks are forked."""
    _pluggable()
