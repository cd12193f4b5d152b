"""Text-to-image and editing classes with one sequence of tokens, or with cross-attention to the text."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.coverage.case import (
    AXES,
    HEAD_DIM,
    HEADED,
    HEADS,
    TEXT_CHANNELS,
    WIDTH,
    Case,
    Draw,
    Kwargs,
    grid,
    small,
)


def z_image(draw: Draw) -> Kwargs:
    """Lists, one picture and one text a sample, texts of different lengths."""
    s = draw.shape
    return {
        "x": [draw.normal(4, 1, 2 * s.height, 2 * s.width) for _ in range(s.batch)],
        "t": draw.times(),
        "cap_feats": [draw.normal(s.text + i * s.padding, TEXT_CHANNELS) for i in range(s.batch)],
    }


def conditioned(draw: Draw, *, mask: bool = False, whole_steps: bool = False, **more: Any) -> Kwargs:
    """Latents, a timestep, a text, and its mask where asked for."""
    given: Kwargs = {
        "hidden_states": draw.latents(),
        "timestep": draw.steps() if whole_steps else draw.times(),
        "encoder_hidden_states": draw.text(),
    }
    if mask:
        given["encoder_attention_mask"] = draw.mask(torch.long)
    return given | {name: make(draw) if callable(make) else make for name, make in more.items()}


def ernie(draw: Draw) -> Kwargs:
    s = draw.shape
    lengths = torch.full((s.batch,), s.text)
    lengths[-1] -= s.padding
    return {"hidden_states": draw.latents(), "timestep": draw.times(), "text_bth": draw.text(), "text_lens": lengths}


def omnigen(draw: Draw) -> Kwargs:
    s = draw.shape
    length = s.text + 1 + s.tokens
    return {
        "hidden_states": draw.latents(),
        "timestep": draw.times(),
        "input_ids": torch.randint(0, 30, (s.batch, s.text), generator=draw.generator),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(s.batch, length, length),
        "position_ids": torch.arange(length).repeat(s.batch, 1),
    }


def hunyuan_dit(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.latents(),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.text(),
        "text_embedding_mask": draw.mask(torch.long),
        "encoder_hidden_states_t5": draw.normal(s.batch, 4, TEXT_CHANNELS),
        "text_embedding_mask_t5": draw.mask(torch.long, text=4),
        "image_meta_size": torch.full((s.batch, 6), 64.0),
        "style": torch.zeros(s.batch, dtype=torch.long),
        "image_rotary_emb": [torch.cos(grid(s.height // 2, s.width // 2).repeat(1, HEAD_DIM // 2)),
                             torch.sin(grid(s.height // 2, s.width // 2).repeat(1, HEAD_DIM // 2))],
    }  # fmt: skip


def nucleus(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, s.tokens, 16),
        "img_shapes": [(1, s.height // 2, s.width // 2)] * s.batch,
        "encoder_hidden_states": draw.text(),
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.times(),
    }


CASES: list[Case] = [
    small(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": WIDTH, "n_layers": 3, "n_refiner_layers": 2, "n_heads": HEADS,
            "n_kv_heads": HEADS, "cap_feat_dim": TEXT_CHANNELS, "axes_dims": list(AXES), "axes_lens": [256, 32, 32],
        },
        z_image,
    ),
    small(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 2,
            "num_attention_heads": HEADS, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": AXES,
            "axes_lens": (64, 32, 32), "cap_feat_dim": TEXT_CHANNELS,
        },
        partial(conditioned, mask=True),
    ),
    small(
        "PixArtTransformer2DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 8, "num_layers": 3, "cross_attention_dim": WIDTH,
            "sample_size": 16, "patch_size": 2, "caption_channels": TEXT_CHANNELS, "use_additional_conditions": False,
        },
        partial(
            conditioned, mask=True, whole_steps=True, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
    ),
    small(
        "SanaTransformer2DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH, "caption_channels": TEXT_CHANNELS,
            "sample_size": 8,
        },
        partial(conditioned, mask=True),
    ),
    small(
        "PRXTransformer2DModel",
        {
            "in_channels": 4, "patch_size": 2, "context_in_dim": TEXT_CHANNELS, "hidden_size": WIDTH,
            "num_heads": HEADS, "depth": 3, "axes_dim": [8, 8],
        },
        partial(conditioned, attention_mask=lambda draw: draw.mask()),
    ),
    small(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 3, "ffn_hidden_size": 2 * WIDTH,
            "in_channels": 4, "out_channels": 4, "text_in_dim": TEXT_CHANNELS, "rope_axes_dim": AXES,
        },
        ernie,
    ),
    small(
        "DiTTransformer2DModel",
        {**HEADED, "in_channels": 4, "num_layers": 3, "sample_size": 16, "num_embeds_ada_norm": 10},
        lambda d: {
            "hidden_states": d.latents(),
            "timestep": d.steps(),
            "class_labels": torch.arange(d.shape.batch),
        },
    ),
    small(
        "HunyuanDiT2DModel",
        {
            **HEADED, "in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": WIDTH, "num_layers": 4,
            "cross_attention_dim": TEXT_CHANNELS, "cross_attention_dim_t5": TEXT_CHANNELS,
            "pooled_projection_dim": 16, "text_len": 5, "text_len_t5": 4,
        },
        hunyuan_dit,
    ),
    small(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
            "intermediate_size": 2 * WIDTH, "num_layers": 3, "pad_token_id": 0, "vocab_size": 32,
            "rope_scaling": {"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))},
            "pos_embed_max_size": 16, "time_step_dim": 16,
        },
        omnigen,
    ),
    small(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADED, "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 5,
            "joint_attention_dim": TEXT_CHANNELS, "axes_dims_rope": AXES, "num_experts": 4, "moe_intermediate_dim": 16,
            "capacity_factors": [2.0] * 5,
        },
        nucleus,
    ),
]
