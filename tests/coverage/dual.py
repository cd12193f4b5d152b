"""Text-to-image and editing classes with a text stream beside the image stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests import models
from tests.coverage.case import (
    AXES,
    HEAD_DIM,
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

ROPE: dict[str, Any] = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "axes_dims_rope": AXES}


# ---- Qwen-Image ------------------------------------------------------------------------------------------------------

QWEN = {
    **ROPE, "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 4,
    "joint_attention_dim": TEXT_CHANNELS,
}  # fmt: skip


def qwen(draw: Draw, mask: bool = False) -> Kwargs:
    """One picture a sample. (What a ControlNet adds is in `tests/test_controlnet.py`.)"""
    s = draw.shape
    return models.qwen_kwargs(s.batch, s.height // 2, s.width // 2, s.text, s.seed, mask)


def qwen_edit(draw: Draw, pictures: int = 3, layered: bool = False) -> Kwargs:
    """Several pictures a sample: the one to make and those it is made from."""
    s = draw.shape
    given = models.qwen_kwargs(s.batch, s.height // 2, s.width // 2, s.text, s.seed)
    given["hidden_states"] = draw.normal(s.batch, pictures * s.tokens, 16)
    given["img_shapes"] = [[(1, s.height // 2, s.width // 2)] * pictures] * s.batch
    if layered:
        given["additional_t_cond"] = torch.zeros(s.batch, dtype=torch.long)
    return given


# ---- FLUX and its kin ------------------------------------------------------------------------------------------------


def flux(draw: Draw) -> Kwargs:
    s = draw.shape
    return models.flux_kwargs(s.batch, s.height // 2, s.width // 2, s.text, s.seed)


def sd3(draw: Draw) -> Kwargs:
    s = draw.shape
    return models.sd3_kwargs(s.batch, s.height, s.width, s.text, s.seed)


def packed(draw: Draw, *drop: str, axes: int = 3, **more: Any) -> Kwargs:
    """Packed latents with positions of both streams, as FLUX takes them."""
    s = draw.shape
    given: Kwargs = {
        "hidden_states": draw.normal(s.batch, s.tokens, 16),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.times(),
        "img_ids": grid(s.height // 2, s.width // 2, 0),
        "txt_ids": torch.zeros(s.text, 3),
    }
    if axes == 4:
        given["img_ids"] = torch.cat([given["img_ids"], torch.zeros(s.tokens, 1)], dim=-1)
        given["txt_ids"] = torch.cat([torch.zeros(s.text, 3), torch.arange(s.text)[:, None]], dim=-1)
    given |= {name: make(draw) if callable(make) else make for name, make in more.items()}
    return {name: value for name, value in given.items() if name not in drop}


FLUX = {**ROPE, "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3}
FLUX |= {"joint_attention_dim": TEXT_CHANNELS}


def guidance(draw: Draw) -> torch.Tensor:
    return torch.full((draw.shape.batch,), 3.5)


def pooled(draw: Draw) -> torch.Tensor:
    return draw.normal(draw.shape.batch, POOLED_CHANNELS)


def bria_fibo(draw: Draw) -> Kwargs:
    given = packed(draw, joint_attention_kwargs={})
    s = draw.shape
    given["text_encoder_layers"] = [draw.normal(s.batch, s.text, WIDTH // 2) for _ in range(6)]
    tokens = s.tokens + s.text
    given["joint_attention_kwargs"] = {"attention_mask": torch.zeros(s.batch, 1, tokens, tokens)}
    return given


def hidream(draw: Draw) -> Kwargs:
    s = draw.shape
    return {
        "hidden_states": draw.latents(),
        "timesteps": draw.times(1000),
        "encoder_hidden_states_t5": draw.text(),
        "encoder_hidden_states_llama3": draw.normal(6, s.batch, s.text, TEXT_CHANNELS),
        "pooled_embeds": pooled(draw),
    }


def hunyuan_image(draw: Draw, second: bool = False) -> Kwargs:
    s = draw.shape
    given: Kwargs = {
        "hidden_states": draw.latents(),
        "timestep": draw.times(1000),
        "encoder_hidden_states": draw.text(),
        "encoder_attention_mask": draw.mask(torch.long),
    }
    if second:
        given["encoder_hidden_states_2"] = draw.normal(s.batch, 4, 12)
        given["encoder_attention_mask_2"] = draw.mask(torch.long, text=4)
    return given


def sized(draw: Draw, *drop: str) -> Kwargs:
    """Latents with the sizes of the original picture, as CogView takes them."""
    s = draw.shape
    size = torch.tensor([[8.0 * s.height, 8.0 * s.width]] * s.batch)
    given = {
        "hidden_states": draw.latents(),
        "encoder_hidden_states": draw.text(),
        "timestep": draw.steps(),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(s.batch, 2),
    }
    return {name: value for name, value in given.items() if name not in drop}


def glm(draw: Draw) -> Kwargs:
    s = draw.shape
    tokens = torch.randint(0, 32, (s.batch, s.tokens), generator=draw.generator)
    return {
        **sized(draw, "original_size"),
        "prior_token_id": tokens,
        "prior_token_drop": draw.mask(text=s.tokens),
    }


COGVIEW = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS, "text_embed_dim": TEXT_CHANNELS, "time_embed_dim": 16, "condition_dim": 8,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": 3,
    "num_single_layers": 3, "num_refiner_layers": 2, "patch_size": (1, 1), "text_embed_dim": TEXT_CHANNELS,
    "rope_axes_dim": (8, 8),
}  # fmt: skip

CASES: list[Case] = [
    small("QwenImageTransformer2DModel", QWEN, qwen),
    small("QwenImageTransformer2DModel", QWEN, partial(qwen, mask=True), "padded text"),
    small("QwenImageTransformer2DModel", QWEN, qwen_edit, "several images"),
    small("QwenImageTransformer2DModel", {**QWEN, "zero_cond_t": True}, qwen_edit, "several images, `zero_cond_t`"),
    small(
        "QwenImageTransformer2DModel",
        {**QWEN, "use_layer3d_rope": True, "use_additional_t_cond": True},
        partial(qwen_edit, layered=True),
        "layered",
    ),
    Case("FluxTransformer2DModel", lambda: models.tiny_flux()[0], flux),
    small(
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        partial(packed, axes=4, guidance=guidance),
    ),
    Case("SD3Transformer2DModel", lambda: models.tiny_sd3()[0], sd3, "dual attention"),
    small(
        "SD3Transformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": TEXT_CHANNELS,
            "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED_CHANNELS, "pos_embed_max_size": 24,
        },
        sd3,
    ),
    small(
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        packed,
    ),
    small(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 3, "num_single_dit_layers": 3,
            "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": TEXT_CHANNELS,
            "caption_projection_dim": WIDTH, "out_channels": 4, "pos_embed_max_size": 256,
        },
        lambda d: {"hidden_states": d.latents(), "encoder_hidden_states": d.text(), "timestep": d.times()},
    ),
    small("HunyuanImageTransformer2DModel", HUNYUAN, hunyuan_image),
    small(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN, "text_embed_2_dim": 12},
        partial(hunyuan_image, second=True),
        "two text encoders",
    ),
    small("CogView4Transformer2DModel", {**COGVIEW, "rope_axes_dim": (32, 32)}, sized),
    small("CogView3PlusTransformer2DModel", {**COGVIEW, "pos_embed_max_size": 16, "sample_size": 16}, sized),
    small("GlmImageTransformer2DModel", {**COGVIEW, "prior_vq_quantizer_codebook_size": 32}, glm),
    small(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 3,
            "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "caption_channels": [TEXT_CHANNELS] * 2,
            "text_emb_dim": POOLED_CHANNELS, "num_routed_experts": 4, "num_activated_experts": 2,
            "axes_dims_rope": AXES, "max_resolution": (16, 16), "llama_layers": list(range(6)),
        },
        hidream,
    ),
    small("BriaTransformer2DModel", {**FLUX, "guidance_embeds": False}, packed),
    small("BriaFiboTransformer2DModel", {**FLUX, "text_encoder_dim": WIDTH // 2}, bria_fibo),
    small("OvisImageTransformer2DModel", {**FLUX, "out_channels": 16}, packed),
    small("LongCatImageTransformer2DModel", {**FLUX, "pooled_projection_dim": POOLED_CHANNELS}, packed),
]
