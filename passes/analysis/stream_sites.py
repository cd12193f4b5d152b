"""The sites that calibration watches: every stream of every stack, and every feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.executor import SEVERAL
from ppcl_fx.ir.partition import Watch
from ppcl_fx.ir.sites import FfnSite, ffn_sites
from ppcl_fx.ir.stacks import Block, Stack, stacks


@dataclass(frozen=True, eq=False)
class StreamSite:
    """One stream through one stack: the nodes that enter and leave each block, in order."""

    stack: Stack
    stream: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def title(self) -> str:
        """Stack and stream in words."""
        return f"stack {self.stack.name}, {self.stream} stream"

    def checked(self, state: Tensor) -> Tensor:
        """Return a state; raise `PpclError` unless it is ``[batch, tokens, channels]``."""
        if state.ndim != 3:
            raise PpclError(
                f"stack {self.stack.name}: the {self.stream} stream is of shape {tuple(state.shape)}, not "
                "[batch, tokens, channels]; such a model cannot be analysed"
            )
        return state


def stream_sites(gm: GraphModule) -> list[StreamSite]:
    """Every stream of every stack of `gm`. Raises `PpclError`: the graph has no block stack."""
    sites = [
        StreamSite(stack, stream, *zip(*((b.inputs[stream], b.outputs[stream]) for b in stack.blocks), strict=True))
        for stack in stacks(gm)
        for stream in stack.streams
        if all(stream in block.inputs and stream in block.outputs for block in stack.blocks)
    ]
    if not sites:
        raise PpclError("the model has no stack of transformer blocks; there is nothing to analyse")
    return sites


def all_ffn_sites(gm: GraphModule) -> tuple[tuple[Block, FfnSite], ...]:
    """Every feed-forward of every block of `gm`, with its block."""
    blocks = [block for stack in stacks(gm) for block in stack.blocks]
    return tuple((block, site) for block in blocks for site in ffn_sites(gm, block))


def rows_of(state: Tensor, batch: int) -> Tensor:
    """Return a stream's state with a row for each sample: before the first block one may stand for all of them."""
    return state.expand(batch, *state.shape[1:]) if len(state) == 1 else state


def mirrored(watches: Sequence[Watch], gm: GraphModule, other: GraphModule) -> list[Watch]:
    """Return watches of a graph as watches of the same model's graph for another kind of call; observers are shared.
    Raises `PpclError`: calls of that kind go through other blocks.
    """
    if other is gm:
        return list(watches)
    mine, theirs = _ends(gm), _ends(other)
    if mine.keys() != theirs.keys():
        raise PpclError(SEVERAL)
    twin = {node: theirs[name] for name, node in mine.items()}
    return [Watch(tuple(twin[node] for node in watch.nodes), watch.observer) for watch in watches]


def _ends(gm: GraphModule) -> dict[Any, Node]:
    """Return the nodes that are looked at, by what they are."""
    found: dict[Any, Node] = {}
    for site in stream_sites(gm):
        for block, before, after in zip(site.stack.blocks, site.inputs, site.outputs, strict=True):
            found[block.path, site.stream, "in"], found[block.path, site.stream, "out"] = before, after
    for number, (block, ffn) in enumerate(all_ffn_sites(gm)):
        found[block.path, number, "in"], found[block.path, number, "out"] = ffn.before, ffn.after
    return found
