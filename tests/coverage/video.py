"""Video classes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.coverage.case import (
    AXES,
    HEAD_DIM,
    HEADED,
    HEADS,
    POOLED_CHANNELS,
    TEXT_CHANNELS,
    WIDTH,
    Case,
    Draw,
    Kwargs,
    small,
)


def clip(draw: Draw, *, mask: bool = False, channels: int = 4, **more: Any) -> Kwargs:
    """A video, a timestep, a text, and its mask where asked for."""
    given: Kwargs = {
        "hidden_states": draw.video(channels),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.text(),
    }
    if mask:
        given["encoder_attention_mask"] = draw.mask(torch.long)
    return given | {name: make(draw) if callable(make) else make for name, make in more.items()}


def pooled(draw: Draw) -> torch.Tensor:
    return draw.normal(draw.shape.batch, POOLED_CHANNELS)


def guidance(draw: Draw) -> torch.Tensor:
    return torch.full((draw.shape.batch,), 6000.0)


def picture(draw: Draw) -> torch.Tensor:
    """The tokens of a reference picture."""
    return draw.normal(draw.shape.batch, 4, TEXT_CHANNELS)


def frames_first(draw: Draw, **more: Any) -> Kwargs:
    """As CogVideoX takes it: ``[batch, frames, channels, height, width]``."""
    given = clip(draw, **more)
    given["hidden_states"] = given["hidden_states"].transpose(1, 2).contiguous()
    return given


def cogvideox(draw: Draw) -> Kwargs:
    s = draw.shape
    given = frames_first(draw)
    angles = torch.arange(s.frames * s.tokens)[:, None] * torch.linspace(1, 0.1, HEAD_DIM // 2).repeat_interleave(2)
    given["image_rotary_emb"] = (angles.cos(), angles.sin())
    return given


def ltx(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, s.frames * s.tokens, 8),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(torch.long),
        "num_frames": s.frames,
        "height": s.height // 2,
        "width": s.width // 2,
    }


def kandinsky(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.normal(s.batch, s.frames, s.height, s.width, 4),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(1000),
        "pooled_projections": pooled(draw),
        "visual_rope_pos": [torch.arange(s.frames), torch.arange(s.height // 2), torch.arange(s.width // 2)],
        "text_rope_pos": torch.arange(s.text),
    }


def vace(draw: Draw) -> Kwargs:
    return clip(draw, control_hidden_states=draw.video(6), control_hidden_states_scale=torch.tensor([1.0, 0.5]))


def hunyuan15(draw: Draw) -> Kwargs:
    s = draw.shape
    image = draw.normal(s.batch, 4, 12)
    return clip(
        draw,
        mask=True,
        timestep=draw.times(1000),
        encoder_hidden_states_2=draw.normal(s.batch, 3, 10),
        encoder_attention_mask_2=draw.mask(torch.long, text=3),
        image_embeds=image if s.padding > 1 else torch.zeros_like(image),
    )


def framepack(draw: Draw) -> Kwargs:
    s = draw.shape
    b, h, w = s.batch, s.height, s.width
    return clip(
        draw,
        mask=True,
        pooled_projections=pooled,
        guidance=guidance,
        image_embeds=draw.normal(b, 3, 12),
        indices_latents=torch.arange(s.frames),
        latents_clean=draw.normal(b, 4, 2, h, w),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=draw.normal(b, 4, 2, h, w),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=draw.normal(b, 4, 4, h, w),
        indices_latents_history_4x=torch.arange(4),
    )


WAN = {
    **HEADED, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": TEXT_CHANNELS, "freq_dim": 16,
    "ffn_dim": 2 * WIDTH, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
HUNYUAN = {
    **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 3, "num_refiner_layers": 2,
    "patch_size": 2, "patch_size_t": 1, "text_embed_dim": TEXT_CHANNELS, "pooled_projection_dim": POOLED_CHANNELS,
    "rope_axes_dim": AXES,
}  # fmt: skip
COGVIDEO = {
    **HEADED, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": TEXT_CHANNELS,
    "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
    "max_text_seq_length": 5,
}  # fmt: skip
VISION = {"image_dim": TEXT_CHANNELS, "added_kv_proj_dim": WIDTH}

CASES: list[Case] = [
    small("WanTransformer3DModel", WAN, clip),
    small("WanTransformer3DModel", WAN | VISION, partial(clip, encoder_hidden_states_image=picture), "image to video"),
    small(
        "WanTransformer3DModel",
        WAN,
        lambda d: clip(d, timestep=d.steps()[:, None].repeat(1, d.shape.frames * d.shape.tokens)),
        "a timestep for each token",
    ),
    small("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 2], "vace_in_channels": 6}, vace),
    small("SkyReelsV2Transformer3DModel", WAN, clip),
    small("ChronoEditTransformer3DModel", WAN | VISION, partial(clip, encoder_hidden_states_image=picture)),
    small(
        "LTXVideoTransformer3DModel",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "num_layers": 3,
            "caption_channels": TEXT_CHANNELS,
        },
        ltx,
    ),
    small(
        "MochiTransformer3DModel",
        {
            **HEADED, "patch_size": 2, "num_layers": 4, "pooled_projection_dim": 16, "in_channels": 4,
            "text_embed_dim": TEXT_CHANNELS, "time_embed_dim": 4, "max_sequence_length": 16,
        },
        partial(clip, mask=True),
    ),
    small("CogVideoXTransformer3DModel", {**COGVIDEO, "use_rotary_positional_embeddings": True}, cogvideox),
    small("CogVideoXTransformer3DModel", COGVIDEO, frames_first, "learned positions"),
    small("ConsisIDTransformer3DModel", {**COGVIDEO, "use_rotary_positional_embeddings": True}, cogvideox),
    small(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        partial(clip, mask=True, pooled_projections=pooled, guidance=guidance),
    ),
    small(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        framepack,
    ),
    small(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_refiner_layers": 2, "patch_size": 1,
            "text_embed_dim": TEXT_CHANNELS, "text_embed_2_dim": 10, "image_embed_dim": 12, "rope_axes_dim": AXES,
            "target_size": 16,
        },
        hunyuan15,
    ),
    small(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "in_text_dim": TEXT_CHANNELS, "in_text_dim2": POOLED_CHANNELS, "time_dim": 16,
            "out_visual_dim": 4, "model_dim": WIDTH, "ff_dim": 2 * WIDTH, "num_text_blocks": 2, "num_visual_blocks": 3,
            "axes_dims": AXES,
        },
        kandinsky,
    ),
    small(
        "AllegroTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": WIDTH,
            "sample_height": 8, "sample_width": 8, "sample_frames": 3, "caption_channels": TEXT_CHANNELS,
        },
        partial(clip, mask=True),
    ),
    small(
        "LatteTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": WIDTH,
            "sample_size": 8, "patch_size": 2, "caption_channels": TEXT_CHANNELS, "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 3,
            "activation_fn": "gelu-approximate", "attention_bias": True,
        },
        clip,
    ),
    small(
        "CosmosTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT_CHANNELS,
            "adaln_lora_dim": 4, "max_size": (8, 32, 32), "concat_padding_mask": False, "controlnet_block_every_n": 1,
        },
        partial(clip, fps=30),
    ),
    small(
        "EasyAnimateTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8,
            "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 16, "text_embed_dim": TEXT_CHANNELS,
        },
        clip,
    ),
    small(
        "SanaVideoTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": HEAD_DIM, "cross_attention_dim": WIDTH, "caption_channels": TEXT_CHANNELS,
            "sample_size": 8, "rope_max_seq_len": 32,
        },
        partial(clip, mask=True),
    ),
    small(
        "MotifVideoTransformer3DModel",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 4,
            "text_embed_dim": TEXT_CHANNELS, "rope_axes_dim": AXES,
        },
        partial(clip, mask=True),
    ),
    small(
        "AnyFlowTransformer3DModel",
        {key: value for key, value in WAN.items() if key != "qk_norm"},
        lambda d: frames_first(
            d,
            timestep=d.steps()[:, None].repeat(1, d.shape.frames),
            r_timestep=d.steps()[:, None].repeat(1, d.shape.frames),
        ),
    ),
]
