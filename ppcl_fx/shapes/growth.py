"""Make the teacher's transformer, and grow it to more blocks."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from ppcl_fx.shapes.pipeline import CHANNELS

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


def _halve_gates(weight: torch.Tensor) -> torch.Tensor:
    """Halve the gate rows of a modulation layer, whose rows are shift, scale, gate, twice over."""
    rows: torch.Tensor = weight.clone().unflatten(0, (2, 3, -1))
    rows[:, 2] *= 0.5
    return rows.reshape(weight.shape)


def grow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a transformer with twice the blocks and nearly the same function.

    Each block comes twice, next to itself, with half the residual gate, so that the two together add
    about what the one added.
    """
    grown: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        match = _BLOCK.match(name)
        if match is None:
            grown[name] = weight.clone()
            continue
        half = _halve_gates(weight) if "_mod.1." in name else weight
        for copy in range(2):
            grown[f"transformer_blocks.{2 * int(match[1]) + copy}.{match[2]}"] = half.clone()
    return grown
