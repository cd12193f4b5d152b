"""Hand-written models with blocks, each of which does one thing that a trace must not get wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class Attention(nn.Module):
    """Self-attention with one head, without an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of ``[batch, tokens, channels]``."""
        return torch.nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))


class Block(nn.Module):
    """Attention with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention gives."""
        return x + self.attn(x)


class Toy(nn.Module):
    """Three blocks; `before` is what the models below differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def before(self, x: Tensor) -> Tensor:
        """What happens before the blocks."""
        return x

    def forward(self, x: Tensor, return_dict: bool = True) -> Any:
        """Run the blocks; the answer is a tuple or, with `return_dict`, a dict."""
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return {"sample": x} if return_dict else (x,)


class CountsTheBatch(Toy):
    """Loops over the batch by its size."""

    def before(self, x: Tensor) -> Tensor:
        """Scale each sample by its number."""
        return torch.stack([x[i] * (i + 1) for i in range(x.shape[0])])


class WalksTheBatch(Toy):
    """Loops over the batch by iterating over the tensor."""

    def before(self, x: Tensor) -> Tensor:
        """Scale each sample by its number."""
        return torch.stack([row * (i + 1) for i, row in enumerate(x)])


class CutsTheBatch(Toy):
    """Only the first samples are looped over: another batch size would give an answer of the right shape."""

    def before(self, x: Tensor) -> Tensor:
        """Add the sum of a prefix whose length is the batch size at most 3."""
        total = torch.zeros_like(x[0])
        for i in range(min(len(x), 3)):
            total = total + x[i]
        return x + total


class WalksAList(Toy):
    """Loops over a list among its arguments."""

    def forward(self, x: Tensor, factors: list[float] | None = None, return_dict: bool = True) -> Any:
        """Scale the input by each factor, then run the blocks."""
        for factor in factors or []:
            x = x * factor
        return super().forward(x, return_dict)


class BranchesOnLength(Toy):
    """Treats long sequences in another way than short ones."""

    def before(self, x: Tensor) -> Tensor:
        """Double the values of sequences of more than four tokens."""
        if x.shape[1] > 4:
            return 2 * x
        return x


class BranchesOnValues(Toy):
    """Decides by the values of its input: a trace holds for calls that decide alike."""

    def before(self, x: Tensor) -> Tensor:
        """Double the values when their sum is positive."""
        if x.sum() > 0:
            return 2 * x
        return x


class AsksItsDevice(Toy):
    """Decides by the kind of device that it runs on."""

    def before(self, x: Tensor) -> Tensor:
        """Double the values on the CPU."""
        if x.device.type == "cpu":
            return 2 * x
        return x


class LeavesAutocast(Toy):
    """Computes a part outside of autocast, as models do with positions."""

    def before(self, x: Tensor) -> Tensor:
        """Multiply the channels by themselves, in the input's own dtype."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return x @ (x.transpose(1, 2) @ x)


class EntersAutocast(Toy):
    """Computes a part in half precision."""

    def before(self, x: Tensor) -> Tensor:
        """Multiply the channels by themselves."""
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ (x.transpose(1, 2) @ x)).to(x.dtype)


class MapsTokens(Toy):
    """Maps a function over the tokens, as flex attention does to make a block mask."""

    def before(self, x: Tensor) -> Tensor:
        """Double every token."""
        return torch.vmap(lambda token: 2 * token, in_dims=1, out_dims=1)(x)


class WantsStorage(nn.Module):
    """Refuses the meta device by a `ValueError`, as flex attention does."""

    def forward(self, x: Tensor) -> Tensor:
        """Double the values."""
        if x.is_meta:
            raise ValueError("Found input tensors on meta device.")
        return 2 * x


class HasAWholePart(Toy):
    """Has a part that cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.part = WantsStorage()

    def before(self, x: Tensor) -> Tensor:
        """Ask the part."""
        doubled: Tensor = self.part(x)
        return doubled


class ModulatedBlock(Block):
    """Attention, then a feed-forward that is modulated token by token; the modulation asks for the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, WIDTH))
        self.ff = nn.ModuleDict({"up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Add what attention gives and then what the feed-forward gives."""
        assert temb is not None
        scale, gate = (self.table + temb.reshape(x.size(0), temb.shape[1], 2, -1)).unbind(dim=2)
        x = super().forward(x)
        return x + gate * self.ff["down"](self.ff["up"](x * scale).relu())


class ModulatesTokens(Toy):
    """Three blocks that are modulated token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(3))

    def forward(self, x: Tensor, temb: Tensor | None = None, return_dict: bool = True) -> Any:
        """Run the blocks; `temb` is ``[batch, tokens, 2 * channels]``."""
        for block in self.blocks:
            x = block(x, temb)
        return (x,)


class Lengths(nn.Module):
    """Reads the lengths of texts from a mask, in Python, as some position embeddings do."""

    def forward(self, mask: Tensor) -> list[int]:
        """Return one whole number for each sample."""
        return [int(length) for length in mask.sum(dim=1).tolist()]


class ReadsLengths(Toy):
    """Cuts each sample by its mask; samples of one length need no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths = Lengths()

    def forward(self, x: Tensor, mask: Tensor | None = None, return_dict: bool = True) -> Any:
        """Add each sample's mean over its valid tokens, doubled where the lengths differ."""
        lengths = self.lengths(mask)
        factor = 2 if len(set(lengths)) > 1 else 1
        means = [sample[:length].mean(dim=0) for sample, length in zip(x, lengths, strict=True)]
        valid = torch.stack([sample[keep].sum(dim=0) for sample, keep in zip(x, mask.bool(), strict=True)])
        return super().forward(x + factor * (torch.stack(means) + valid)[:, None], return_dict)


def masked(*lengths: int, tokens: int = 6) -> dict[str, Any]:
    """Inputs for `ReadsLengths`: one sample of each length."""
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {**example(len(lengths), tokens), "mask": mask}


def example(batch: int = 2, tokens: int = 6) -> dict[str, Any]:
    """Inputs for the models above."""
    return {"x": torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(batch + tokens))}


def build(kind: type[Toy]) -> nn.Module:
    """Build a toy with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()
