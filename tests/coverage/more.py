"""Newer editing, text-to-image and audio-visual classes."""

from __future__ import annotations

from functools import partial

import torch

from tests.coverage.case import (
    AXES,
    HEADED,
    HEADS,
    POOLED_CHANNELS,
    TEXT_CHANNELS,
    WIDTH,
    Case,
    Draw,
    Kwargs,
    grid,
    small,
)
from tests.coverage.dual import packed
from tests.coverage.video import WAN, clip, ltx, pooled


def krea2(draw: Draw) -> Kwargs:
    """The text as the states of several layers; positions of text and image in one list."""
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, s.tokens, 16),
        "encoder_hidden_states": draw.normal(s.batch, s.text, 2, TEXT_CHANNELS),
        "timestep": draw.times(),
        "position_ids": torch.cat([torch.zeros(s.text, 3), grid(s.height // 2, s.width // 2, 0)]),
        "encoder_attention_mask": draw.mask(),
    }


def ideogram(draw: Draw) -> Kwargs:
    """One sequence of text and image tokens, told apart by an indicator."""
    s = draw.shape
    length = s.text + s.tokens
    indicator = torch.tensor([3] * s.text + [2] * s.tokens).repeat(s.batch, 1)
    segments = torch.ones(s.batch, length, dtype=torch.long)
    segments[-1, : s.padding] = 0
    return {
        "hidden_states": draw.normal(s.batch, length, 16),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(s.batch, length, TEXT_CHANNELS),
        "position_ids": torch.arange(length)[None, :, None].repeat(s.batch, 1, 3),
        "segment_ids": segments,
        "indicator": indicator,
    }


def joy(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, 2, 4, 1, s.height, s.width),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
    }


def joy_plus(draw: Draw) -> Kwargs:
    s = draw.shape
    shapes = [(1, s.height // 2, s.width // 2)] * 2
    return {
        "hidden_states": draw.normal(s.batch, 2 * s.tokens, 4, 1, 2, 2),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
        "encoder_hidden_states_mask": draw.mask(),
        "shape_list": [shapes] * s.batch,
    }


def kandinsky6(draw: Draw, sound: bool = True) -> Kwargs:
    s = draw.shape
    given: Kwargs = {
        "hidden_states": draw.normal(s.batch, s.frames, s.height, s.width, 4),
        "encoder_hidden_states": draw.text(),
        "pooled_projections": pooled(draw),
        "timestep": draw.times(1000),
    }
    return given | ({"audio_hidden_states": draw.normal(s.batch, 6, 8)} if sound else {})


def ltx2(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        **ltx(draw),
        "audio_hidden_states": draw.normal(s.batch, 6, 8),
        "audio_encoder_hidden_states": draw.text(),
        "audio_encoder_attention_mask": draw.mask(torch.long),
        "audio_num_frames": 6,
    }


def qwen21(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, s.tokens, 16),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(),
        "img_shapes": [[(1, s.height // 2, s.width // 2)]] * s.batch,
        "img_mask": torch.tensor([[False] * s.text + [True] * (s.tokens // 4)] * s.batch),
        "encoder_hidden_states_mask": draw.mask(),
    }


def fibo2(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.latents(),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(s.batch, 2, s.text, TEXT_CHANNELS),
        "encoder_attention_mask": draw.mask(),
    }


KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_CHANNELS, "in_text_dim2": POOLED_CHANNELS,
    "time_dim": 16, "model_dim": WIDTH, "ff_dim": 2 * WIDTH, "num_text_blocks": 2, "num_visual_blocks": 3,
    "axes_dims": AXES, "visual_cond": False, "in_audio_dim": 8, "out_audio_dim": 8,
}  # fmt: skip
JOY = {
    "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": TEXT_CHANNELS, "num_layers": 3,
    "rope_dim_list": list(AXES),
}  # fmt: skip

CASES: list[Case] = [
    small(
        "Flux3Transformer2DModel",
        {
            **HEADED, "in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 3,
            "joint_attention_dim": TEXT_CHANNELS, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
        },
        partial(packed, axes=4),
    ),
    small(
        "Krea2Transformer2DModel",
        {
            **HEADED, "in_channels": 16, "num_layers": 3, "num_key_value_heads": 1, "intermediate_size": 2 * WIDTH,
            "timestep_embed_dim": 16, "text_hidden_dim": TEXT_CHANNELS, "num_text_layers": 2,
            "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": WIDTH,
            "axes_dims_rope": AXES,
        },
        krea2,
    ),
    small(
        "Ideogram4Transformer2DModel",
        {
            **HEADED, "in_channels": 16, "num_layers": 3, "intermediate_size": 2 * WIDTH, "adaln_dim": 16,
            "llm_features_dim": TEXT_CHANNELS, "mrope_section": (4, 2, 2),
        },
        ideogram,
    ),
    small("JoyImageEditTransformer3DModel", JOY, joy),
    small("JoyImageEditPlusTransformer3DModel", JOY, joy_plus),
    small("Kandinsky6Transformer3DModel", KANDINSKY, kandinsky6, "with sound"),
    small("Kandinsky6Transformer3DModel", KANDINSKY, partial(kandinsky6, sound=False), "without sound"),
    small(
        "LTX2VideoTransformer3DModel",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "audio_in_channels": 8,
            "audio_out_channels": 8, "audio_num_attention_heads": HEADS, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16, "num_layers": 3, "caption_channels": TEXT_CHANNELS,
        },
        ltx2,
    ),
    small(
        "QwenImage21Transformer2DModel",
        {**HEADED, "in_channels": 16, "out_channels": 16, "num_layers": 3, "context_in_dim": TEXT_CHANNELS,
         "axes_dims_rope": AXES},
        qwen21,
    ),
    small(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4, "dim": WIDTH, "n_layers": 4, "n_refiner_layers": 2, "n_heads": HEADS,
            "cap_feat_dim": TEXT_CHANNELS, "injection_layer_ids": (1,), "perceiver_num_layers": 2,
            "min_num_gist_tokens": 2, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 2,
            "gist_max_text_len": 8, "axes_dims": AXES, "axes_lens": (64, 32, 32),
        },
        fibo2,
    ),
    small(
        "HeliosTransformer3DModel",
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": AXES},
        lambda d: clip(d, indices_hidden_states=torch.arange(d.shape.frames).repeat(d.shape.batch, 1)),
    ),
]  # fmt: skip
