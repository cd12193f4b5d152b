"""A small random pipeline on disk, as a user's model folder: quick, and independent of the shipped weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from ppcl_fx.shapes.pipeline import CHANNELS, ShapesPipeline
from ppcl_fx.shapes.words import WordEncoder

BLOCKS = 6
WORD_CHANNELS = 16


def save_pipeline(folder: Path, seed: int = 0, blocks: int = BLOCKS) -> Path:
    """Write a pipeline of `blocks` random blocks of width 32 in diffusers' layout, and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WORD_CHANNELS,
            axes_dims_rope=(4, 6, 6),
        )
    pipeline = ShapesPipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), WordEncoder(channels=WORD_CHANNELS)
    )
    pipeline.save_pretrained(folder)
    return folder
