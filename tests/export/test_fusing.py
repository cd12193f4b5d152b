"""Written-out rotations become one operator; equal constants and results are shared; what does not fit stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ppcl_fx.export.fusing import fuse
from ppcl_fx.export.fusing.rotary import fuse_rotary
from ppcl_fx.export.fusing.values import paired, sizes
from ppcl_fx.export.onnx.assemble import Initializers, held
from tests.export.operators import operators

CONSTANTS = (
    "int64[1] heads = {2}, int64[1] open = {-1}, int64[1] two = {2}, int64[1] width = {16}, int64[1] all = {8}, "
    "int64 zero = {0}, int64 one = {1}, int64[1] n0 = {0}, int64[1] n1 = {1}, int64[1] last = {-1}, "
    "int64[3] pairs = {1, 1, 2}, int64[2] channels = {-1, 16}"
)
SIZES = """
  b = Shape <start = 0, end = 1> (x)
  s = Shape <start = 1, end = 2> (x)
  split = Concat <axis = 0> (b, s, heads, open, two)
  whole = Concat <axis = 0> (b, s, heads, width)
  xs = Reshape (x, split)
"""
COMPLEX = """
  t = Unsqueeze (table, n1)
  a = Gather <axis = -1> (xs, zero)
  b2 = Gather <axis = -1> (xs, one)
  c = Gather <axis = -1> (t, zero)
  d = Gather <axis = -1> (t, one)
  ac = Mul (a, c)
  bd = Mul (b2, d)
  ad = Mul (a, d)
  bc = Mul (b2, c)
  re = Sub (ac, bd)
  im = Add (ad, bc)
  re1 = Unsqueeze (re, last)
  im1 = Unsqueeze (im, last)
  both = Concat <axis = -1> (re1, im1)
  y = Reshape (both, whole)
"""
TABLES = """
  cos1 = Unsqueeze (cos_half, two)
  cos2 = Expand (cos1, pairs)
  cos = Reshape (cos2, channels)
  sin1 = Unsqueeze (sin_half, two)
  sin2 = Expand (sin1, pairs)
  sin = Reshape (sin2, channels)
"""
TURNED = """
  cos3 = Unsqueeze (cos, n0)
  cos4 = Unsqueeze (cos3, two)
  sin3 = Unsqueeze (sin, n0)
  sin4 = Unsqueeze (sin3, two)
  a0 = Slice (xs, n0, n1, last)
  a = Squeeze (a0, last)
  b0 = Slice (xs, n1, two, last)
  b2 = Squeeze (b0, last)
  nb = Neg (b2)
  nb1 = Unsqueeze (nb, last)
  a1 = Unsqueeze (a, last)
  both = Concat <axis = -1> (nb1, a1)
  turned = Reshape (both, whole)
  left = Mul (x, cos4)
  right = Mul (turned, sin4)
  y = Add (left, right)
"""


def model(body: str, inputs: str) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23]> g ({inputs}) => (float[batch, tokens, 2, 16] y) '
        f"<{CONSTANTS}> {{ {body} }}"
    )


def complex_product(body: str = COMPLEX) -> ir.Model:
    return model(SIZES + body, "float[batch, tokens, 2, 16] x, float[tokens, 8, 2] table")


def turned_sum(body: str = TABLES + TURNED) -> ir.Model:
    inputs = "float[batch, tokens, 2, 16] x, float[tokens, 8] cos_half, float[tokens, 8] sin_half"
    return model(SIZES + body, inputs)


def run(given: ir.Model, batch: int, tokens: int) -> np.ndarray:
    random = np.random.default_rng(batch * 100 + tokens)
    session = onnxruntime.InferenceSession(
        ir.to_proto(given).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    open_sizes = {"batch": batch, "tokens": tokens}
    feeds = {
        i.name: random.standard_normal([open_sizes.get(n, n) for n in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    return session.run(None, feeds)[0]  # type: ignore[no-any-return]


def counts(given: ir.Model) -> Counter[str]:
    return sum(operators(given).values(), Counter())


@pytest.mark.parametrize("build", [complex_product, turned_sum])
def test_rotation_becomes_one_operator(build: Any) -> None:
    before, after = build(), build()
    assert fuse(after) == (1, {})
    found = counts(after)
    assert found["RotaryEmbedding"] == 1
    gone = ("Mul", "Sub", "Add", "Neg", "Squeeze")
    assert {name: found[name] for name in gone} == dict.fromkeys(gone, 0)
    for batch, tokens in ((1, 3), (2, 5), (3, 11)):
        assert np.abs(run(before, batch, tokens) - run(after, batch, tokens)).max() < 1e-6
    assert fuse(after) == (0, {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ac = Mul (a, c)", "ac = Mul (c, a)"),
        ("bc = Mul (b2, c)", "bc = Mul (c, b2)"),
        ("im = Add (ad, bc)", "im = Add (bc, ad)"),
    ],
)
def test_order_of_factors_and_terms_does_not_matter(old: str, new: str) -> None:
    given = complex_product(COMPLEX.replace(old, new))
    assert COMPLEX.replace(old, new) != COMPLEX
    assert fuse_rotary(given) == (1, {})


@pytest.mark.parametrize(
    ("old", "new"),
    [("y = Add (left, right)", "y = Add (right, left)"), ("left = Mul (x, cos4)", "left = Mul (cos4, x)")],
)
def test_order_does_not_matter_in_the_sum(old: str, new: str) -> None:
    given = turned_sum((TABLES + TURNED).replace(old, new))
    assert fuse_rotary(given) == (1, {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("re = Sub (ac, bd)", "re = Sub (bd, ac)"),  # the wrong sign
        ("im = Add (ad, bc)", "im = Sub (ad, bc)"),
        ("ad = Mul (a, d)", "ad = Mul (a, c)"),
        ("(re1, im1)", "(im1, re1)"),
    ],
)
def test_what_is_no_rotation_is_left(old: str, new: str) -> None:
    given = complex_product(COMPLEX.replace(old, new))
    before = list(ir.to_proto(given).graph.node)
    assert fuse_rotary(given) == (0, {})
    assert list(ir.to_proto(given).graph.node) == before


def test_rotation_the_other_way_is_left() -> None:
    given = turned_sum((TABLES + TURNED).replace("(nb1, a1)", "(a1, nb1)"))
    assert fuse_rotary(given) == (0, {})


def test_table_of_unknown_pairs_is_refused() -> None:
    inputs = "float[batch, tokens, 2, 16] x, float[tokens, 16] cos, float[tokens, 16] sin"
    given = model(SIZES + TURNED, inputs)
    before = list(ir.to_proto(given).graph.node)
    count, unfused = fuse_rotary(given)
    assert count == 0
    assert list(unfused.values()) == [
        "its position table is not known to hold each number twice in a row"
    ]
    assert list(ir.to_proto(given).graph.node) == before


def test_table_with_a_row_for_each_head_is_refused() -> None:
    body = SIZES + COMPLEX.replace("t = Unsqueeze (table, n1)", "t = Unsqueeze (table, n0)")
    given = model(body, "float[batch, tokens, 2, 16] x, float[2, 8, 2] table")
    count, unfused = fuse_rotary(given)
    assert (count, list(unfused.values())) == (
        0, ["its position table is not known to be [tokens, pairs, 2]"],
    )  # fmt: skip


def test_open_number_of_heads_is_refused() -> None:
    body = "h = Shape <start = 2, end = 3> (x)" + (SIZES + COMPLEX).replace("heads", "h")
    given = model(body, "float[batch, tokens, 2, 16] x, float[tokens, 8, 2] table")
    count, unfused = fuse_rotary(given)
    assert (count, list(unfused.values())) == (0, ["the number of heads or of channels is not fixed"])


def test_pairs_are_proved_and_not_assumed() -> None:
    given = turned_sum()
    values = {value.name: value for node in given.graph for value in node.outputs}
    assert paired(values["cos"]) == 2
    assert paired(values["turned"]) is None
    assert paired(given.graph.inputs[1]) is None
    assert sizes(values["split"]) == [values["b"], values["s"], 2, -1, 2]


def test_equal_constants_are_shared_and_weights_are_not() -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    graph = ir.Graph([], [], nodes=[])
    initializers = Initializers(module, graph, held)
    kept = [initializers("weight")]
    for name, values in {"one": [1, 2], "same": [1, 2], "shaped": [[1, 2]], "whole": [1, 2]}.items():
        tensor = ir.tensor(np.asarray(values, np.int64 if name == "whole" else np.float32))
        kept.append(initializers.constant(name, ir.Value(name=name, const_value=tensor)))
    assert sorted(graph.initializers) == ["one", "shaped", "weight", "whole"]
    assert kept[1] is kept[2] and len({id(value) for value in kept}) == 4
    assert initializers("weight") is kept[0]


def test_equal_results_are_computed_once() -> None:
    text = (
        '<ir_version: 11, opset_import: ["" : 23]> g (float[batch, tokens, 2, 16] x) => '
        "(float[batch, tokens, 2, 16] y) "
        "{ a = Sigmoid (x) s = Mul (x, a) b = Sigmoid (x) t = Mul (x, b) y = Add (s, t) }"
    )
    before, after = ir.from_onnx_text(text), ir.from_onnx_text(text)
    fuse(after)
    assert counts(after) == {"Sigmoid": 1, "Mul": 1, "Add": 1}
    assert np.array_equal(run(before, 2, 5), run(after, 2, 5))
