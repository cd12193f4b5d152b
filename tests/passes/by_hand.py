"""Width-wise replacement on Qwen-Image written out in eager code: what the rewritten graph must compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule


@dataclass
class Parts:
    """What one block gets in place of its own parts.

    Attributes:
        ffn: projector of each stream whose feed-forward is replaced.
        z: projector of the source block's ``z``, in a block without a text stream.
        state: projector of the text state, in the last block of a group.
        is_source: the block whose ``z`` the group starts from.
    """

    ffn: Mapping[str, nn.Module] = field(default_factory=dict)
    z: nn.Module | None = None
    state: nn.Module | None = None
    is_source: bool = False


class BlockByHand(nn.Module):
    """A dual-stream block with some parts replaced; `shared` carries ``z`` from the source to the others."""

    def __init__(self, block: Any, parts: Parts, shared: dict[str, Tensor]) -> None:
        super().__init__()
        self.block = block
        self.parts = parts
        self.shared = shared

    def _modulation(self, name: str, stream: str, temb: Tensor) -> tuple[Tensor, ...]:
        linear = self.block.get_submodule(name)[1]
        rows = 3 * linear.in_features if stream in self.parts.ffn else 6 * linear.in_features
        values = nn.functional.linear(nn.functional.silu(temb), linear.weight[:rows], linear.bias[:rows])
        return values.unsqueeze(1).chunk(rows // linear.in_features, dim=-1)

    def _feed_forward(self, stream: str, name: str, h: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        if stream in self.parts.ffn:
            return h + self.parts.ffn[stream](h)
        shift, scale, gate = mod[3:]
        normed = self.block.get_submodule(f"{name}_norm2")(h)
        return h + gate * self.block.get_submodule(f"{name}_mlp")(normed * (1 + scale) + shift)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute the block; returns the text and the image state."""
        h, e = hidden_states, encoder_hidden_states
        image = self._modulation("img_mod", "image", temb)
        x = self.block.img_norm1(h) * (1 + image[1]) + image[0]
        if self.parts.z is not None:
            z = self.shared["z"] + self.parts.z(self.shared["z"])
        else:
            text = self._modulation("txt_mod", "text", temb)
            z = self.block.txt_norm1(e) * (1 + text[1]) + text[0]
        if self.parts.is_source:
            self.shared["z"] = z
        image_attention, text_attention = self.block.attn(
            hidden_states=x,
            encoder_hidden_states=z,
            encoder_hidden_states_mask=None,
            image_rotary_emb=image_rotary_emb,
        )
        h = self._feed_forward("image", "img", h + image[2] * image_attention, image)
        if self.parts.z is None:
            e = self._feed_forward("text", "txt", e + text[2] * text_attention, text)
        elif self.parts.state is not None:
            e = e + self.parts.state(e)
        return e, h


def by_hand(model: nn.Module, parts: Mapping[int, Parts]) -> Any:
    """Return a copy of a Qwen-Image transformer with the given blocks written out."""
    copied: Any = copy.deepcopy(model)
    shared: dict[str, Tensor] = {}
    for index, part in parts.items():
        copied.transformer_blocks[index] = BlockByHand(copied.transformer_blocks[index], part, shared)
    return copied


def randomise(gm: GraphModule, seed: int = 3) -> None:
    """Give every projector random weights, so that a projector left out or misplaced shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gm.get_submodule("projectors").parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
