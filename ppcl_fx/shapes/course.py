"""A teaching run: how its model begins and grows, what it keeps between steps, and how it is saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from safetensors.torch import load_file

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import new_folder, safetensors_metadata, write_safetensors
from ppcl_fx.shapes.fastpath import speed_up
from ppcl_fx.shapes.pipeline import CHANNELS, ShapesPipeline
from ppcl_fx.shapes.words import WordEncoder

SHIFT = 3.0
"""Timestep shift towards noise of the pipeline's scheduler."""
STATE = "state.safetensors"
LATEST = "latest"
WIDTH, HEADS, WORD_CHANNELS = 96, 6, 64
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)$")


def empty_transformer(blocks: int) -> Any:
    """Return a ``QwenImageTransformer2DModel`` of the teacher's sizes with torch's own starting weights."""
    return QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=blocks,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WORD_CHANNELS,
        axes_dims_rope=(4, 6, 6),
    )


def new_transformer(blocks: int, seed: int) -> Any:
    """Return a transformer whose blocks start as the identity and whose output starts at zero."""
    torch.manual_seed(seed)
    model = empty_transformer(blocks)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(r"(_mod\.1|norm_out\.linear|proj_out)\.", name):
                weight.zero_()
    return model


def grow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a transformer with twice the blocks and nearly the same function.

    Each block comes twice, next to itself, with half the residual gate, so that the two together add
    about what the one added.
    """
    wide: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        match = _BLOCK.match(name)
        if match is None:
            wide[name] = weight.clone()
            continue
        half = weight.clone()
        if "_mod.1." in name:  # a modulation's rows are shift, scale, gate, twice over
            half.unflatten(0, (2, 3, -1))[:, 2] *= 0.5
        for copy in range(2):
            wide[f"transformer_blocks.{2 * int(match[1]) + copy}.{match[2]}"] = half.clone()
    return wide


@dataclass
class Course:
    """A teaching run: the transformer, its averaged weights, and how far it has come.

    ``stage_step`` counts from the last growth; ``seconds`` is the time used so far.
    """

    model: Any
    average: dict[str, torch.Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    blocks: int
    step: int = 0
    stage_step: int = 0
    seconds: float = 0.0

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the transformer's weights by name, not copied."""
        return {name: weight.detach() for name, weight in self.model.named_parameters()}


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' attention and MLP matrices, and AdamW for all else."""
    turned: list[Any] = []
    others: list[Any] = []
    for name, weight in model.named_parameters():
        inner = "transformer_blocks." in name and "_mod." not in name and weight.dim() == 2
        (turned if inner else others).append(weight)
    return [
        torch.optim.Muon(turned, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def begin(blocks: int, seed: int, compiled: bool, weights: dict[str, torch.Tensor] | None = None) -> Course:
    """Start a course with new weights, or with given ones."""
    if weights is None:
        model = new_transformer(blocks, seed)
    else:
        model = empty_transformer(blocks)
        model.load_state_dict(weights)
    speed_up(model, compiled)
    course = Course(model.train(), {}, _optimizers(model), blocks)
    course.average = {name: weight.clone() for name, weight in course.weights().items()}
    return course


def grown(course: Course, compiled: bool) -> Course:
    """Return the course gone on with twice the blocks; the optimizers start afresh."""
    new = begin(course.blocks * 2, 0, compiled, grow(course.weights()))
    new.average = grow(course.average)
    new.step, new.seconds = course.step, course.seconds
    return new


def pipeline_of(average: dict[str, torch.Tensor], blocks: int, words: WordEncoder) -> ShapesPipeline:
    """Return a pipeline with the given weights, rounded to bfloat16 but kept in float32."""
    model = empty_transformer(blocks)
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in average.items()})
    pipeline = ShapesPipeline(model.eval(), FlowMatchEulerDiscreteScheduler(shift=SHIFT), words)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(course: Course, out: Path, words: WordEncoder, blocks: int) -> None:
    """Write a checkpoint, and the averaged weights in bfloat16 as the pipeline folder ``out/latest``.

    A course that has not grown to its final number of blocks is grown for the folder only.
    """
    names = {id(weight): name for name, weight in course.model.named_parameters()}
    tensors = {f"model/{name}": weight for name, weight in course.weights().items()}
    tensors |= {f"average/{name}": weight for name, weight in course.average.items()}
    for optimizer in course.optimizers:
        for weight, slots in optimizer.state.items():
            tensors |= {f"optimizer/{names[id(weight)]}/{key}": value for key, value in slots.items()}
    facts = {name: getattr(course, name) for name in ("blocks", "step", "stage_step", "seconds")}
    save_state(out / STATE, tensors, facts)

    average, count = course.average, course.blocks
    while count < blocks:
        average, count = grow(average), count * 2
    pipeline = pipeline_of(average, count, words)
    pipeline.transformer.bfloat16()
    with new_folder(out / LATEST, replaces=owned.PIPELINE) as beside:
        pipeline.save_pretrained(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that their owner alone can read


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the transformer's weights of a pipeline folder, in float32.

    Raises:
        PpclError: there is no such pipeline.
    """
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise PpclError(f"no transformer weights at {file}; give a pipeline folder that teach wrote")
    return {name: weight.float() for name, weight in load_file(file).items()}


def save_state(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, float]) -> None:
    """Write tensors and a few numbers to one safetensors file, atomically."""
    write_safetensors(path, tensors, {name: repr(value) for name, value in facts.items()})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Read what ``save_state`` wrote; PpclError where there is no such file."""
    if not path.is_file():
        raise PpclError(f"no checkpoint at {path}; leave out --resume to start anew")
    return load_file(path), {name: float(value) for name, value in safetensors_metadata(path).items()}


def resume(out: Path, compiled: bool) -> Course:
    """Return the course of the checkpoint in a folder. Raises PpclError where there is no checkpoint."""
    tensors, facts = load_state(out / STATE)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, value in tensors.items():
        kind, rest = name.split("/", 1)
        parts[kind][rest] = value
    course = begin(int(facts["blocks"]), 0, compiled, parts["model"])
    course.average = parts["average"]
    course.step, course.stage_step = int(facts["step"]), int(facts["stage_step"])
    course.seconds = facts["seconds"]
    weights = dict(course.model.named_parameters())
    owners = {w: one for one in course.optimizers for group in one.param_groups for w in group["params"]}
    for name, value in parts["optimizer"].items():
        weight, key = name.rsplit("/", 1)
        owners[weights[weight]].state[weights[weight]][key] = value
    return course
