"""``RotaryEmbedding`` of opset 23 where a rotary embedding is written out in products and sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ppcl_fx.export.fusing.pairs import paired
from ppcl_fx.export.fusing.values import Size, attribute, ints, made_by, sizes

_LAST = 2**63 - 1


@dataclass(frozen=True)
class Unfused:
    """A rotation that stays as it is.

    Attributes:
        node: the name of its last node.
        reason: why.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class Half:
    """Cosines or sines, one for each pair of channels, taken from a table ``[tokens, ...]``.

    Attributes:
        table: the table: ``[tokens, pairs, 2]`` of both, or ``[tokens, channels]`` that holds each number twice.
        part: for a table of both, which of the two to take, else None.
    """

    table: ir.Value
    part: int | None


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding of neighbouring channels, found in a graph.

    Attributes:
        last: the node whose output is the result.
        x: what is rotated, ``[batch, tokens, heads, channels]``.
        shape: the value that holds these four sizes, as the graph reshapes to them.
        cos: where its cosines are.
        sin: where its sines are.
    """

    last: ir.Node
    x: ir.Value
    shape: ir.Value
    cos: Half
    sin: Half


class _Refused(Exception):
    """It is a rotation, but not one that can be fused; the text says why."""


def fuse_rotary(model: ir.Model) -> tuple[int, tuple[Unfused, ...]]:
    """Put one ``RotaryEmbedding`` where a rotation is written out; the nodes it replaces are left without use.

    Two ways of writing it are known: as a complex product in real parts (``ac - bd``, ``ad + bc``), and as ``x cos +
    turned(x) sin`` with ``turned`` the neighbours exchanged and one negated. The rotation stays in the type that the
    model does it in, float32 as a rule.

    Args:
        model: the model, changed in place; equal nodes should be shared before.

    Returns:
        How many there are now, and those that stay written out.
    """
    graph = model.graph
    writer = _Writer(graph)
    unfused = []
    for node in list(graph):
        try:
            found = _complex_product(node) or _turned_sum(node)
            if found is not None:
                writer.write(found)
        except _Refused as reason:
            unfused.append(Unfused(node.name or "", str(reason)))
    return writer.count, tuple(unfused)


# ---- the complex product -----------------------------------------------------------------------------------------


def _complex_product(node: ir.Node) -> Rotation | None:
    """``Reshape(stack(ac - bd, ad + bc))`` with ``a, b`` the parts of one pair and ``c, d`` those of the other."""
    parts = _stacked(node.inputs[0]) if node.op_type == "Reshape" else None
    minus = made_by(parts[0], "Sub") if parts is not None else None
    plus = made_by(parts[1], "Add") if parts is not None else None
    if minus is None or plus is None:
        return None
    products = [_product(value) for value in (*minus.inputs, *plus.inputs)]
    if any(product is None or set(product) != set(products[0] or ()) for product in products):
        return None
    one, two = products[0] or {}
    chosen = [(product[one], product[two]) for product in products if product is not None]
    if chosen[:2] != [(0, 0), (1, 1)] or sorted(chosen[2:]) != [(0, 1), (1, 0)]:
        return None
    for x, table in ((one, two), (two, one)):
        source = made_by(x, "Reshape")
        placed = made_by(table, "Unsqueeze")
        if source is not None and placed is not None:
            root = _pair_table(placed)
            return _rotation(node, source, source.inputs[0], node.inputs[1], Half(root, 0), Half(root, 1))
    raise _Refused("its position table does not come with one row a token")


def _product(value: ir.Value | None) -> dict[ir.Value, int] | None:
    """Return for a product of two parts which part of which pair it takes."""
    node = made_by(value, "Mul")
    parts = [_part(item) for item in node.inputs] if node is not None else []
    found = dict(part for part in parts if part is not None)
    return found if len(found) == 2 else None


def _pair_table(placed: ir.Node) -> ir.Value:
    root = placed.inputs[0]
    assert root is not None
    if root.shape is None or len(root.shape) != 3 or ints(placed.inputs[1]) != (1,):
        raise _Refused("its position table is not known to be [tokens, pairs, 2]")
    return root


# ---- the sum with what is turned ---------------------------------------------------------------------------------


def _turned_sum(node: ir.Node) -> Rotation | None:
    """``x cos + turned(x) sin``."""
    products = [made_by(value, "Mul") for value in node.inputs] if node.op_type == "Add" else []
    found = [product for product in products if product is not None]
    if len(found) != 2:
        return None
    one, two = found
    return _matched(node, one, two) or _matched(node, two, one)


def _matched(node: ir.Node, straight: ir.Node, product: ir.Node) -> Rotation | None:
    for turned, sin in _both_orders(product):
        fold = _folded(turned)
        source = _turned_from(fold) if fold is not None else None
        if fold is None or source is None:
            continue
        raw = source.inputs[0]
        for x, cos in _both_orders(straight):
            cast = made_by(x, "Cast")
            if x is raw or (cast is not None and cast.inputs[0] is raw):
                return _rotation(node, source, x, fold.inputs[1], _half_table(cos), _half_table(sin))
    return None


def _both_orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    one, two = node.inputs
    assert one is not None and two is not None
    yield one, two
    yield two, one


def _folded(value: ir.Value) -> ir.Node | None:
    """The node that folds pairs into channels, with or without a cast behind it."""
    cast = made_by(value, "Cast")
    return made_by(cast.inputs[0] if cast is not None else value, "Reshape")


def _turned_from(fold: ir.Node) -> ir.Node | None:
    """``stack(-b, a)``: the node that makes the pairs ``(a, b)`` of channels."""
    parts = _stacked(fold.inputs[0])
    negative = made_by(parts[0], "Neg") if parts is not None else None
    if parts is None or negative is None:
        return None
    b, a = _part(negative.inputs[0]), _part(parts[1])
    if a is None or b is None or a[0] is not b[0] or (a[1], b[1]) != (0, 1):
        return None
    return made_by(a[0], "Reshape")


def _half_table(value: ir.Value) -> Half:
    added: list[tuple[int, ...]] = []
    node = made_by(value, "Unsqueeze")
    while node is not None:
        added.insert(0, ints(node.inputs[1]) or ())
        assert node.inputs[0] is not None
        value = node.inputs[0]
        node = made_by(value, "Unsqueeze")
    rank = paired(value)
    if rank is None:
        raise _Refused("its position table is not known to hold each number twice in a row")
    if rank != 2 or _placed(added) != ["new", "tokens", "new", "channels"]:
        raise _Refused("its position table does not come with one row a token")
    return Half(value, None)


def _placed(added: list[tuple[int, ...]]) -> list[str]:
    """Return the dimensions of a table ``[tokens, channels]`` after new ones were put in."""
    dims = ["tokens", "channels"]
    for axes in added:
        rank = len(dims) + len(axes)
        new = {axis % rank for axis in axes}
        old = iter(dims)
        dims = ["new" if index in new else next(old) for index in range(rank)]
    return dims


# ---- what both share ---------------------------------------------------------------------------------------------


def _stacked(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return two values that are stacked along a new last dimension."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or attribute(joined, "axis", 0) != -1:
        return None
    deeper = [made_by(item, "Unsqueeze") for item in joined.inputs]
    found = [n.inputs[0] for n in deeper if n is not None and ints(n.inputs[1]) == (-1,)]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return found[0], found[1]


def _part(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return what a value is one item of, along the last dimension, and which: ``x[..., 0]`` or ``x[..., 1]``."""
    gather = made_by(value, "Gather")
    if gather is not None and attribute(gather, "axis", 0) == -1:
        index = ints(gather.inputs[1])
        source = gather.inputs[0]
        return (source, index[0]) if source is not None and index in ((0,), (1,)) else None
    squeeze = made_by(value, "Squeeze")
    cut = made_by(squeeze.inputs[0], "Slice") if squeeze is not None else None
    if squeeze is None or cut is None or len(squeeze.inputs) < 2 or ints(squeeze.inputs[1]) != (-1,):
        return None
    start, end, axes = (ints(item) for item in cut.inputs[1:4])
    step = ints(cut.inputs[4]) if len(cut.inputs) > 4 and cut.inputs[4] is not None else (1,)
    source = cut.inputs[0]
    if axes != (-1,) or step != (1,) or source is None or (start, end) not in (((0,), (1,)), ((1,), (2,))):
        return None
    return source, start[0] if start is not None else 0


def _rotation(
    last: ir.Node, source: ir.Node, x: ir.Value | None, shape: ir.Value | None, cos: Half, sin: Half
) -> Rotation:
    """Check the sizes and types that ``RotaryEmbedding`` needs, and return the rotation."""
    whole, split = sizes(shape), sizes(source.inputs[1])
    if x is None or shape is None or whole is None or split is None or (len(whole), len(split)) != (4, 5):
        raise _Refused("its sizes are not known to be [batch, tokens, heads, channels]")
    heads, channels = whole[2:]
    if not isinstance(heads, int) or not isinstance(channels, int) or min(heads, channels) < 1:
        raise _Refused("the number of heads or of channels is not fixed")
    same = all(one is two or one == two for one, two in zip(whole[:3], split[:3], strict=True))
    if not same or split[4] != 2 or split[3] not in (-1, channels // 2):
        raise _Refused("the pairs are not neighbouring channels of one head")
    types = {value.dtype for value in (x, cos.table, sin.table) if value.dtype is not None}
    if len(types) > 1:
        raise _Refused("what is rotated and the table are of different types")
    return Rotation(last, x, shape, cos, sin)


class _Writer:
    """Writes ``RotaryEmbedding`` nodes; half tables are made once for all that share table and batch."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.count = 0
        self.tables: dict[tuple[ir.Value, int | None, Size], ir.Value] = {}
        self.before: ir.Node

    def write(self, found: Rotation) -> None:
        self.before = found.last
        whole = sizes(found.shape)
        assert whole is not None
        batch, tokens, heads, channels = whole
        assert isinstance(heads, int) and isinstance(channels, int)
        flat = self._shape("flat", batch, tokens, heads * channels)
        rows = self._node("Reshape", "rows", [found.x, flat])
        inputs = [rows, self._table(found.cos, batch), self._table(found.sin, batch)]
        turned = self._node("RotaryEmbedding", "turned", inputs, {"interleaved": 1, "num_heads": heads})
        result = self._node("Reshape", "result", [turned, found.shape])
        result.type = found.last.outputs[0].type
        found.last.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        self.count += 1

    def _table(self, half: Half, batch: Size) -> ir.Value:
        key = (half.table, half.part, batch)
        if key not in self.tables:
            if half.part is None:
                bounds = [self._numbers(word, [n]) for word, n in _EVERY_SECOND]
                one = self._node("Slice", "half", [half.table, *bounds])
            else:
                index = self._node("Constant", f"part{half.part}", [], {"value_int": half.part})
                one = self._node("Gather", f"half{half.part}", [half.table, index], {"axis": -1})
            # The operator wants a row for each sample and token.
            shape = self._shape("samples", batch, 1, 1)
            self.tables[key] = self._node("Expand", "table", [one, shape])
        return self.tables[key]

    def _shape(self, name: str, *numbers: Size) -> ir.Value:
        pieces = [n if isinstance(n, ir.Value) else self._numbers(f"{name}_{i}", [n]) for i, n in enumerate(numbers)]
        return self._node("Concat", name, pieces, {"axis": 0})

    def _numbers(self, name: str, numbers: list[int]) -> ir.Value:
        return self._node("Constant", name, [], {"value_ints": numbers})

    def _node(
        self, op_type: str, name: str, inputs: list[ir.Value], attributes: dict[str, int | list[int]] | None = None
    ) -> ir.Value:
        number = len(self.graph)  # grows with each node, so that names differ
        node = ir.node(op_type, inputs, attributes or {}, name=f"{self.before.name or 'rotary'}/rotary_{name}_{number}")
        node.outputs[0].name = f"{node.name}_out"
        self.graph.insert_before(self.before, node)
        return node.outputs[0]


_EVERY_SECOND = (("from", 0), ("to", _LAST), ("along", -1), ("step", 2))
"""The arguments of ``Slice`` that takes every second column."""
