"""Sites: where in a block's graph a feed-forward or a text stream can be replaced. Found by structure alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import LINEAR, ancestors, is_add
from ppcl_fx.ir.stacks import Block, is_attention


@dataclass(frozen=True)
class FfnSite:
    """A gated feed-forward with its residual: the path of its block, and the stream that it works on."""

    block: str
    stream: str
    before: Node
    """The state after the gated attention residual, ``[batch, tokens, channels]``."""
    after: Node
    """The state after the gated feed-forward residual, of the same shape."""


@dataclass(frozen=True)
class TextSite:
    """The text stream of a block: the block's path, the attention's node, and the text state that leaves the block."""

    block: str
    attention: Node
    z: Node
    """The normed, modulated text state that feeds the text Q, K, V projections, ``[batch, tokens, channels]``."""
    leaving: Node


def ffn_sites(gm: GraphModule, block: Block) -> list[FfnSite]:
    """Return the feed-forwards of a block that stand alone: one for each stream that has one.

    A site is the last residual sum of a stream whose other operand comes from the state before it, through at
    least two linear layers and no attention. A block whose feed-forward runs beside its attention has none.
    """
    found = []
    inside = set(block.nodes)
    for stream, leaving in block.outputs.items():
        after = _residual_sum(leaving, inside)
        before = None if after is None else _state_before(gm, after, inside, set(block.inputs.values()))
        if after is not None and before is not None:
            found.append(FfnSite(block.path, stream, before, after))
    return found


def _residual_sum(node: Node, inside: set[Node]) -> Node | None:
    """Return the last residual sum on the way back from a block's output (a clip may come after it)."""
    while node in inside and not is_add(node):
        if len(casts := _casts(node)) > 1:
            node = casts[1]
            continue
        same = [n for n in node.all_input_nodes if n in inside and _shape(n) == _shape(node)]
        if len(same) != 1 or node.op == "call_module":
            return None
        node = same[0]
    return node if node in inside else None


def _casts(node: Node) -> list[Node]:
    """Return a node and what it is computed from, as long as all that happens is a change of dtype."""
    chain = [node]
    while node.op == "call_method" and node.target in ("float", "to", "type_as", "type"):
        source = node.args[0]
        if not isinstance(source, Node) or _shape(source) != _shape(node):
            break
        chain.append(node := source)
    return chain


def _state_before(gm: GraphModule, after: Node, inside: set[Node], entering: set[Node]) -> Node | None:
    left, right = after.args
    assert isinstance(left, Node) and isinstance(right, Node)
    for summand, branch in ((left, right), (right, left)):
        if _shape(summand) != _shape(after):
            continue
        before = next((n for n in _casts(summand) if n in ancestors([branch], stop=[n], within=inside | {n})), None)
        if before is None:
            continue
        # Everything that depends on `before` between the two: the norm, the modulation, the feed-forward, the gate.
        slice_ = ancestors([branch], stop=[before], within=inside | {before})
        depending = {n for n in slice_ if before in ancestors([n], stop=[before], within=slice_)}
        if any(is_attention(gm, node) for node in depending) or _linears(gm, depending) < 2:
            continue
        # Any other token state in the branch would make the projector a function of something it does not see. A
        # modulation may have the shape of one, token by token; but it does not come from the streams, of which it may
        # know the sizes.
        others = [n for n in slice_ - depending if _shape(n) == _shape(before)]
        told = {n for n in inside if not _is_size(n)} | entering
        if not any(entering & ancestors([n], stop=entering, within=told) for n in others):
            return before
    return None


def _is_size(node: Node) -> bool:
    """Tell whether a node asks for a tensor's sizes, which hold nothing of its numbers."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _linears(gm: GraphModule, nodes: set[Node]) -> int:
    called = [gm.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    inside = sum(isinstance(module, kinds) for parent in called for module in parent.modules())
    return inside + sum(node.target in LINEAR for node in nodes)


def text_site(gm: GraphModule, block: Block) -> TextSite:
    """Return the text stream of a block. Raises `Refusal`: the block has one stream, or its attention takes the two
    streams in one tensor.
    """
    if "text" not in block.inputs or "text" not in block.outputs or len(block.outputs) < 2:
        raise Refusal(f"{block.path} has no text stream of its own, so it cannot lose one; choose another block")
    inside = set(block.nodes)
    streams = dict(block.inputs)
    attentions = [node for node in block.nodes if is_attention(gm, node)]
    for node in attentions:
        for argument in node.all_input_nodes:
            if argument not in inside or len(_shape(argument)) != 3:
                continue
            sources = ancestors([argument], stop=streams.values(), within=inside | set(streams.values()))
            if {name for name, entering in streams.items() if entering in sources} == {"text"}:
                return TextSite(block.path, node, argument, block.outputs["text"])
    looked = ", ".join(node.name for node in attentions) or "no attention node"
    raise Refusal(
        f"the attention of {block.path} takes no argument computed from the text stream alone ({looked}); "
        "choose another block"
    )


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
