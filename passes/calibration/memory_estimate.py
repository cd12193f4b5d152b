"""What a streamed run needs in memory at least, estimated from a trace before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ppcl_fx.errors import PpclError
from ppcl_fx.io.memory import anonymous, size_words
from ppcl_fx.ir.graphs import attribute
from ppcl_fx.ir.partition import Segment, cut
from ppcl_fx.passes.analysis.probes import WIDE
from ppcl_fx.passes.analysis.stream_sites import StreamSite
from ppcl_fx.passes.calibration.reservoir import CHUNK_BYTES

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call

INSIDE = 12
"""Times its largest value that a block's inside holds at once: heads, gates, a feed-forward four times as wide."""


def state_budget(gm: GraphModule, calls: Sequence[Call], sites: Sequence[StreamSite], limit: int) -> int:
    """Return how many of the bytes that the process may hold are free for the calls' values between two blocks.

    Of the calls that are to run the largest counts; `sites` are the streams that are measured, if any; `limit` includes
    what the process holds now.

    Raises:
        PpclError: the limit is too small for even one block.
    """
    largest = max((elements(call.kwargs) for call in calls), default=1)
    scale = largest / max(1, elements(calls[0].kwargs)) if len(calls) else 1.0
    width = max((int(site.outputs[0].meta["val"].shape[-1]) for site in sites), default=0)
    # A block's sums, of held-out calls too, with the tokens not yet in them, and one of them being solved in float64.
    sums = width**2 * (16 * (8 if width <= WIDE else 4) + 8 * 4 + 6 * 8)
    block = block_bytes(gm, scale) + sums
    need = anonymous() + max(block, max((_curves(site, scale) for site in sites), default=0))
    if need > limit:
        raise PpclError(
            f"--memory-limit {size_words(limit)}: too small for this model and these calls; "
            f"give at least {size_words(need)}"
        )
    return limit - need


def block_bytes(gm: GraphModule, scale: float, skip: Callable[[Node], bool] = lambda node: False) -> int:
    """Return the bytes that the heaviest segment of a streamed run takes while it runs: weights and values inside.

    `scale` is the size of the largest call over that of the traced one; nodes to `skip` are not run.
    """
    weights = max(segment_weights(gm, segment) for segment in cut(gm, skip=skip))
    values = (value_bytes(node.meta.get("val")) for node in gm.graph.nodes if not skip(node))
    # On a CPU a matrix product may keep a second copy of its weights, laid out for the processor.
    return 2 * weights + INSIDE * int(scale * max(values, default=0))


def segment_weights(gm: GraphModule, segment: Segment) -> int:
    """Return the bytes of a segment's parameters and buffers."""
    return sum(value_bytes(attribute(gm, name)) for name in segment.tensors)


def _curves(site: StreamSite, scale: float) -> int:
    """Bytes that the curves of the largest sample take: states, features, surrogates and Gram matrices."""
    value = site.outputs[0].meta["val"]
    tokens, width = int(value.shape[1] * scale / max(1, value.shape[0])) or 1, int(value.shape[2])
    one = (len(site.outputs) + 1) * tokens * width * (int(value.element_size()) + 4)
    return max(2 * CHUNK_BYTES, one) + 2 * CHUNK_BYTES + 8 * tokens * width * 4


def elements(value: Any) -> int:
    """Return the number of elements of the tensors in a value: what the cost of a call is taken to grow with."""
    if isinstance(value, Mapping):  # `Examples` too, which PyTorch's trees take for a leaf
        return sum(elements(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(elements(item) for item in value)
    return value.numel() if isinstance(value, Tensor) else 0


def value_bytes(value: Any) -> int:
    """Return the bytes of the tensors in a value, its lists and tuples."""
    if isinstance(value, list | tuple):
        return sum(value_bytes(item) for item in value)
    return int(value.nbytes) if isinstance(value, Tensor) else 0
