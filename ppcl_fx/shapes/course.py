"""A teaching run: how its model begins and grows, what it keeps between steps, and how it is saved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch.nn import functional

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import new_folder, safetensors_metadata, write_safetensors
from ppcl_fx.shapes.pipeline import CHANNELS, ShapesPipeline
from ppcl_fx.shapes.words import WordEncoder

SHIFT = 3.0  # timestep shift towards noise of the pipeline's scheduler
STATE = "state.safetensors"
LATEST = "latest"
FACTS = ("blocks", "step", "stage_step", "seconds")
WIDTH, HEADS, WORD_CHANNELS = 96, 6, 64
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)$")


class RealAttention:
    """Attention processor of diffusers' ``QwenImageTransformerBlock`` that computes with real numbers.

    Products of complex ones, as diffusers has them, are not fused by ``torch.compile``: teaching takes twice as long.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None and attention_mask is None
        words = encoder_hidden_states.shape[1]
        of_picture, of_caption = image_rotary_emb
        cos, sin = torch.view_as_real(torch.cat([of_caption, of_picture]))[None, :, None].unbind(-1)

        def heads(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = layer(tokens).unflatten(-1, (attn.heads, -1))
            return out

        def rotated(caption: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
            a, b = torch.cat([caption, picture], dim=1).unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

        caption, picture = encoder_hidden_states, hidden_states
        query = rotated(attn.norm_added_q(heads(attn.add_q_proj, caption)), attn.norm_q(heads(attn.to_q, picture)))
        key = rotated(attn.norm_added_k(heads(attn.add_k_proj, caption)), attn.norm_k(heads(attn.to_k, picture)))
        value = torch.cat([heads(attn.add_v_proj, caption), heads(attn.to_v, picture)], dim=1)
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed[:, words:]), attn.to_add_out(mixed[:, :words])


def speed_up(transformer: Any, compiled: bool) -> None:
    """Make a transformer quick to teach, in place; its weights and answers stay the same.

    ``compiled`` also compiles its blocks, which needs a C++ compiler.
    """
    for block in transformer.transformer_blocks:
        block.attn.set_processor(RealAttention())
    if compiled:
        transformer.compile_repeated_blocks()


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
        half, match = weight.clone(), _BLOCK.match(name)
        if "_mod.1." in name:  # a modulation's rows are shift, scale, gate, twice over
            half.unflatten(0, (2, 3, -1))[:, 2] *= 0.5
        if match is None:
            wide[name] = half
            continue
        for copy in range(2):
            wide[f"transformer_blocks.{2 * int(match[1]) + copy}.{match[2]}"] = half.clone()
    return wide


@dataclass
class Course:
    """A teaching run."""

    model: Any
    average: dict[str, torch.Tensor]  # of the weights
    optimizers: list[torch.optim.Optimizer]
    blocks: int
    step: int = 0
    stage_step: int = 0  # counts from the last growth
    seconds: float = 0.0  # used so far

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the transformer's weights by name, not copied."""
        return {name: weight.detach() for name, weight in self.model.named_parameters()}


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    inner = [n for n, w in named.items() if "transformer_blocks." in n and "_mod." not in n and w.dim() == 2]
    others = [weight for name, weight in named.items() if name not in inner]
    return [
        torch.optim.Muon([named[name] for name in inner], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def begin(blocks: int, seed: int, compiled: bool, weights: dict[str, torch.Tensor] | None = None) -> Course:
    """Start a course with new weights, or with given ones."""
    model = new_transformer(blocks, seed)
    if weights is not None:
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
    save_state(out / STATE, tensors, {name: getattr(course, name) for name in FACTS})

    average, count = course.average, course.blocks
    while count < blocks:
        average, count = grow(average), count * 2
    pipeline = pipeline_of(average, count, words)
    pipeline.transformer.bfloat16()
    with new_folder(out / LATEST, replaces=owned.PIPELINE) as beside:
        pipeline.save_pretrained(beside)
        for path in beside.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that their owner alone can read


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the transformer's weights of a pipeline folder, in float32. Raises PpclError where there is none."""
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

    def part(kind: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}

    course = begin(int(facts["blocks"]), 0, compiled, part("model/"))
    course.average = part("average/")
    course.step, course.stage_step, course.seconds = int(facts["step"]), int(facts["stage_step"]), facts["seconds"]
    weights = dict(course.model.named_parameters())
    owners = {w: one for one in course.optimizers for group in one.param_groups for w in group["params"]}
    for name, value in part("optimizer/").items():
        weight, key = name.rsplit("/", 1)
        owners[weights[weight]].state[weights[weight]][key] = value
    return course
