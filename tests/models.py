"""Small random models of diffusers, with inputs for them: what the tests trace, prune and export.

Every builder returns ``(model, example_kwargs)``: float32, in evaluation mode, the same weights and inputs each time.
The inputs are complete keyword arguments as a pipeline passes them (``return_dict=False`` included), so that
``model(**example_kwargs)[0]`` is the prediction. `other_kwargs(model)` gives a second set: another batch size, another
resolution (not square) and another text length.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import nn

Kwargs = dict[str, Any]

HEADS = 2
HEAD_DIM = 16
WIDTH = HEADS * HEAD_DIM
TEXT_CHANNELS = 24
POOLED_CHANNELS = 20

QWEN_BLOCKS = 6
FLUX_DUAL_BLOCKS = 4
FLUX_SINGLE_BLOCKS = 5
SD3_BLOCKS = 8
SD3_DUAL_ATTENTION = (0, 1, 2)


def _seeded(build: type[nn.Module], seed: int, **config: Any) -> nn.Module:
    """Build the model with weights from `seed`, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**config).eval()


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _timesteps(generator: torch.Generator, batch: int) -> torch.Tensor:
    """Different for each sample, in (0, 1)."""
    return 0.05 + 0.9 * torch.rand(batch, generator=generator)


def tiny_qwen(seed: int = 0, blocks: int = QWEN_BLOCKS) -> tuple[nn.Module, Kwargs]:
    """Qwen-Image: `blocks` dual-stream blocks of width 32."""
    model = _seeded(
        QwenImageTransformer2DModel,
        seed,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 6, 6),
    )
    return model, qwen_kwargs()


def tiny_flux(seed: int = 0) -> tuple[nn.Module, Kwargs]:
    """FLUX.1-dev (with guidance): 4 dual-stream blocks, then 5 single-stream blocks, of width 32."""
    model = _seeded(
        FluxTransformer2DModel,
        seed,
        patch_size=1,
        in_channels=16,
        num_layers=FLUX_DUAL_BLOCKS,
        num_single_layers=FLUX_SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return model, flux_kwargs()


def tiny_sd3(seed: int = 0) -> tuple[nn.Module, Kwargs]:
    """SD3.5: blocks 0-2 with dual attention, 3-6 plain, and 7, the last, context-pre-only."""
    model = _seeded(
        SD3Transformer2DModel,
        seed,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=SD3_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED_CHANNELS,
        pos_embed_max_size=24,
        dual_attention_layers=SD3_DUAL_ATTENTION,
        qk_norm="rms_norm",
    )
    return model, sd3_kwargs()


def qwen_kwargs(
    batch: int = 2, height: int = 4, width: int = 4, text: int = 5, seed: int = 1, mask: bool = False
) -> Kwargs:
    """Inputs of `tiny_qwen`; `height` x `width` image tokens. With `mask`, one text token is padding."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, text, dtype=torch.bool)
    valid[-1, -1] = False
    return {
        "hidden_states": _normal(generator, batch, height * width, 16),
        "encoder_hidden_states": _normal(generator, batch, text, TEXT_CHANNELS),
        "encoder_hidden_states_mask": valid if mask else None,
        "timestep": _timesteps(generator, batch),
        "img_shapes": [[(1, height, width)]] * batch,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
    }


def flux_kwargs(batch: int = 2, height: int = 4, width: int = 4, text: int = 5, seed: int = 1) -> Kwargs:
    """Inputs of `tiny_flux`; `height` x `width` image tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float()
    return {
        "hidden_states": _normal(generator, batch, height * width, 16),
        "encoder_hidden_states": _normal(generator, batch, text, TEXT_CHANNELS),
        "pooled_projections": _normal(generator, batch, POOLED_CHANNELS),
        "timestep": _timesteps(generator, batch),
        "img_ids": positions,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def sd3_kwargs(batch: int = 2, height: int = 8, width: int = 8, text: int = 5, seed: int = 1) -> Kwargs:
    """Inputs of `tiny_sd3`; `height` x `width` latent pixels, two by two to a token."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": _normal(generator, batch, 4, height, width),
        "encoder_hidden_states": _normal(generator, batch, text, TEXT_CHANNELS),
        "pooled_projections": _normal(generator, batch, POOLED_CHANNELS),
        "timestep": 1000 * _timesteps(generator, batch),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def other_kwargs(model: nn.Module) -> Kwargs:
    """Inputs for one of the models above with another batch size, resolution and text length than its example's."""
    if isinstance(model, QwenImageTransformer2DModel):
        return qwen_kwargs(batch=3, height=6, width=4, text=7, seed=2)
    if isinstance(model, FluxTransformer2DModel):
        return flux_kwargs(batch=3, height=6, width=4, text=7, seed=2)
    if isinstance(model, SD3Transformer2DModel):
        return sd3_kwargs(batch=3, height=12, width=8, text=7, seed=2)
    raise TypeError(f"no inputs known for a {type(model).__name__}")
