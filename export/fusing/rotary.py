"""``RotaryEmbedding`` of opset 23 where a rotary embedding is written out in products and sums."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from ppcl_fx.export.fusing.values import Size, ints, paired, sizes

_EVERY_SECOND = (0, 2**63 - 1, -1, 2)
"""The arguments of ``Slice`` that takes every second column: from, to, along, step."""


# ---- what is looked for; `op` builds patterns, and the other arguments are what they find ----------------------------


def _complex_product(op: Any, x: Any, split: Any, table: Any, axes: Any, whole: Any) -> Any:
    """``ac - bd`` and ``ad + bc``, with ``a, b`` a pair of channels and ``c, d`` a pair of the table."""
    pairs, placed = op.Reshape(x, split), op.Unsqueeze(table, axes)
    a, b, c, d = (op.Gather(source, part, axis=-1) for source in (pairs, placed) for part in (0, 1))
    real, imaginary = op.Sub(op.Mul(a, c), op.Mul(b, d)), op.Add(op.Mul(a, d), op.Mul(b, c))
    return op.Reshape(_stacked(op, real, imaginary), whole, _outputs=["last"])


def _turned_sum(op: Any, x: Any, split: Any, cos: Any, sin: Any, whole: Any) -> Any:
    """``x cos + turned(x) sin``, with ``turned`` the neighbours exchanged and one negated."""
    return _sum(op, x, _turned(op, x, split, whole), cos, sin)


def _turned_sum_of_casts(op: Any, narrow: Any, split: Any, cos: Any, sin: Any, whole: Any) -> Any:
    """The same of channels in half precision, in float32."""
    return _sum(op, op.Cast(narrow, _outputs=["x"]), op.Cast(_turned(op, narrow, split, whole)), cos, sin)


def _turned(op: Any, x: Any, split: Any, whole: Any) -> Any:
    pairs = op.Reshape(x, split)
    cuts = [op.Slice(pairs, [part], [part + 1], [-1], _allow_other_inputs=True) for part in (0, 1)]
    a, b = (op.Squeeze(cut, [-1]) for cut in cuts)
    return op.Reshape(_stacked(op, op.Neg(b), a), whole)


def _stacked(op: Any, one: Any, two: Any) -> Any:
    return op.Concat(op.Unsqueeze(one, [-1]), op.Unsqueeze(two, [-1]), axis=-1)


def _sum(op: Any, x: Any, turned: Any, cos: Any, sin: Any) -> Any:
    placed = [op.Unsqueeze(op.Unsqueeze(table, [0]), [2]) for table in (cos, sin)]
    return op.Add(op.Mul(x, placed[0]), op.Mul(turned, placed[1]), _outputs=["last"])


# ---- what is done with it ----------------------------------------------------------------------------------------


def fuse_rotary(model: ir.Model) -> tuple[int, dict[str, str]]:
    """Put one ``RotaryEmbedding`` where a rotation is written out, in the type that the model does it in.

    Args:
        model: the model, changed in place; equal nodes should be shared before, and should be shared after.

    Returns:
        How many there are now; and for those that stay written out, by the name of their last node, the reason.
    """
    unfused: dict[str, str] = {}

    def fits(context: Any, **found: Any) -> bool:
        reason = _misfit(**found)
        if reason is not None:
            unfused[context.root.name] = reason
        return reason is None

    ways = (_complex_product, _turned_sum, _turned_sum_of_casts)
    rules = [RewriteRule(way, _fused, fits, remove_nodes=False) for way in ways]
    return RewriteRuleSet(rules, commute=True).apply_to_model(model), unfused


def _misfit(x: ir.Value, split: ir.Value, whole: ir.Value, **tables: Any) -> str | None:
    """Tell why sizes, types or tables are not those that ``RotaryEmbedding`` takes; None if they are."""
    kinds = {value.dtype for value in (x, *map(tables.get, ("table", "cos", "sin"))) if value is not None}
    shape, pairs = sizes(whole), sizes(split)
    if "table" in tables:
        root = tables["table"]
        if root.shape is None or len(root.shape) != 3 or ints(tables["axes"]) != (1,):
            return "its position table is not known to be [tokens, pairs, 2]"
    elif (paired(tables["cos"]), paired(tables["sin"])) != (2, 2):
        return "its position table is not known to hold each number twice in a row"
    if shape is None or pairs is None or (len(shape), len(pairs)) != (4, 5):
        return "its sizes are not known to be [batch, tokens, heads, channels]"
    heads, channels = shape[2:]
    if not isinstance(heads, int) or not isinstance(channels, int) or min(heads, channels) < 1:
        return "the number of heads or of channels is not fixed"
    same = all(one is two or one == two for one, two in zip(shape[:3], pairs[:3], strict=True))
    if not same or pairs[4] != 2 or pairs[3] not in (-1, channels // 2):
        return "the pairs are not neighbouring channels of one head"
    return "what is rotated and the table are of different types" if len(kinds - {None}) > 1 else None


def _fused(op: Any, x: ir.Value, whole: ir.Value, last: ir.Value, **tables: Any) -> Any:
    """Write the operator; `op` makes the nodes."""

    def shape(*numbers: Size) -> Any:
        pieces = [op.Constant(value_ints=[n]) if isinstance(n, int) else n for n in numbers]
        return op.Concat(*pieces, axis=0)

    found: Any = sizes(whole)  # `_misfit` has seen them
    batch, tokens, heads, channels = found
    if "table" in tables:
        halves = [op.Gather(tables["table"], op.Constant(value_int=part), axis=-1) for part in (0, 1)]
    else:
        bounds = [op.Constant(value_ints=[number]) for number in _EVERY_SECOND]
        halves = [op.Slice(tables[name], *bounds) for name in ("cos", "sin")]
    # The operator wants a row for each sample and token.
    rows = [op.Expand(half, shape(batch, 1, 1)) for half in halves]
    flat = op.Reshape(x, shape(batch, tokens, heads * channels))
    result = op.Reshape(op.RotaryEmbedding(flat, *rows, interleaved=1, num_heads=heads), whole)
    for number, node in enumerate(op.nodes):
        node.name = f"{last.producer().name or 'rotary'}/rotary_{number}"  # type: ignore[union-attr]
        node.outputs[0].name = f"{node.name}_out"
    return result
