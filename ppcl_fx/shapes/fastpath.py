"""A quicker way to run the transformer's attention while it is taught.

It computes what diffusers' own attention processor computes, with real numbers in place of complex
ones and one product in place of three, so that ``torch.compile`` can fuse it.  Weights are untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def _project(x: torch.Tensor, layers: tuple[Any, Any, Any], heads: int) -> tuple[torch.Tensor, ...]:
    """Return query, key and value, each (batch, tokens, heads, channels), by one product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    joint: torch.Tensor = functional.linear(x, weight, bias).unflatten(-1, (3, heads, -1))
    return joint.unbind(2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring channels by the angles of each token."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over tensors (batch, tokens, heads, channels), as plain products and a softmax.

    The fused CPU kernel's bfloat16 backward is many times slower than this.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    marks = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (torch.softmax(marks.float(), dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, written with a sigmoid, which is quicker on a CPU."""
    return x * torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))


class FastAttention:
    """Attention processor for ``QwenImageTransformerBlock`` that expects (cos, sin) as rotary embedding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs for the picture's and the caption's tokens."""
        assert image_rotary_emb is not None and attention_mask is None
        words = encoder_hidden_states.shape[1]
        picture = _project(hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.heads)
        caption = _project(
            encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.heads
        )
        kind = picture[2].dtype
        cos, sin = (part[None, :, None] for part in image_rotary_emb)
        query = torch.cat([attn.norm_added_q(caption[0]), attn.norm_q(picture[0])], dim=1)
        key = torch.cat([attn.norm_added_k(caption[1]), attn.norm_k(picture[1])], dim=1)
        value = torch.cat([caption[2], picture[2]], dim=1)
        mixed = _attend(_rotate(query, cos, sin).to(kind), _rotate(key, cos, sin).to(kind), value)
        return attn.to_out[0](mixed[:, words:]), attn.to_add_out(mixed[:, :words])


class _RealRope(nn.Module):
    """Wrap a rotary embedding to give cosines and sines for caption and picture tokens in one row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cos, sin), each (words + patches, channels / 2)."""
        picture, caption = self.inner(*args, **kwargs)
        turns = torch.cat([caption, picture])
        return turns.real.contiguous(), turns.imag.contiguous()


def speed_up(transformer: Any, compiled: bool) -> None:
    """Make a transformer quick to teach, in place; its weights and answers stay the same.

    Args:
        transformer: diffusers' ``QwenImageTransformer2DModel``.
        compiled: also compile its blocks; needs a C++ compiler.
    """
    transformer.pos_embed = _RealRope(transformer.pos_embed)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FastAttention())
        block.img_mlp.net[0].gelu = _gelu
        block.txt_mlp.net[0].gelu = _gelu
    if compiled:
        transformer.compile_repeated_blocks()
