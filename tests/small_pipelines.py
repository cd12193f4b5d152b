"""Small pipelines of every kind, whose transformers' calls are recorded; and how a call is run again."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
)

from ppcl_fx.calls.store import Call
from ppcl_fx.shapes.captions import VOCABULARY
from ppcl_fx.shapes.pipeline import CHANNELS, ShapesPipeline
from ppcl_fx.shapes.words import WordEncoder

WORDS = VOCABULARY[1:]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_qwen(**config: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    default = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**{**default, **config}).eval()


def qwen() -> tuple[DiffusionPipeline, dict[str, Any]]:
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=small_qwen(), **parts
    )
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[:, 3:] = 0
    return pipeline, {
        "prompt_embeds": noise(3, 5, 12),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": noise(3, 4, 12, seed=1),
        "true_cfg_scale": 2.0,
        "height": 32,
        "width": 48,
        "output_type": "latent",
    }


def flux() -> tuple[DiffusionPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **dict.fromkeys(names)
    )
    return pipeline, {
        "prompt_embeds": noise(3, 5, 12),
        "pooled_prompt_embeds": noise(3, 10, seed=1),
        "height": 32,
        "width": 48,
        "output_type": "latent",
    }


def sd3() -> tuple[DiffusionPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
    ).eval()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        vae=None,
        **dict.fromkeys(names),
    )
    return pipeline, {
        "prompt_embeds": noise(3, 5, 32),
        "pooled_prompt_embeds": noise(3, 10, seed=1),
        "negative_prompt_embeds": noise(3, 5, 32, seed=2),
        "negative_pooled_prompt_embeds": noise(3, 10, seed=3),
        "height": 32,
        "width": 48,
        "output_type": "latent",
    }


def shapes() -> ShapesPipeline:
    encoder = WordEncoder(channels=12)
    transformer = small_qwen(in_channels=CHANNELS, out_channels=CHANNELS, patch_size=1)
    return ShapesPipeline(transformer, FlowMatchEulerDiscreteScheduler(), encoder)


def run(call: Call, model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(**call.kwargs)[0]
    return answer


def outputs(model: torch.nn.Module) -> tuple[list[torch.Tensor], Any]:
    seen: list[torch.Tensor] = []
    return seen, model.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))


def small_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def small_wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def small_qwen_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        attn_scales=[],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8).eval()
