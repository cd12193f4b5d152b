"""A model is asked for sizes that were never computed: position tables end somewhere, and checks refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.export.onnx.dynamic_axes import Axis
from ppcl_fx.export.onnx.writer import Prepared, prepare
from ppcl_fx.export.verify.sizes import _at, refused
from ppcl_fx.tracing import trace

pytestmark = pytest.mark.slow

Tiny = tuple[nn.Module, dict[str, Any]]


def prepared(tiny: Tiny) -> Prepared:
    return prepare(trace(*tiny), tiny[1], 2)


def test_text_longer_than_the_position_table_is_refused(tiny_qwen: Tiny) -> None:
    ready = prepared(tiny_qwen)
    assert refused(ready, {"batch": 8, "hidden_states_1": 4096, "encoder_hidden_states_1": 512}) is None
    reason = refused(ready, {"encoder_hidden_states_1": 5000})
    assert reason is not None and "encoder_hidden_states_1 = 5000 is asked for" in reason
    # 17 tokens are no square, and the example's shapes of the picture say nothing else: it cannot be told.
    assert refused(ready, {"hidden_states_1": 17}) is None


def test_latents_larger_than_the_position_table_are_refused(tiny_sd3: Tiny) -> None:
    ready = prepared(tiny_sd3)
    assert refused(ready, {"hidden_states_2": 16, "hidden_states_3": 32}) is None
    reason = refused(ready, {"hidden_states_2": 64})
    assert reason is not None and "pos_embed_max_size" in reason and "\n" not in reason


def test_a_model_without_a_limit_takes_all(tiny_flux: Tiny) -> None:
    assert refused(prepared(tiny_flux), {"hidden_states_1": 16384, "encoder_hidden_states_1": 4096}) is None


def test_a_graph_that_asks_for_values_cannot_be_asked(tiny_flux: Tiny) -> None:
    ready = prepared(tiny_flux)
    output = ready.gm.graph.output_node()
    first = next(node for node in ready.gm.graph.nodes if node.op == "placeholder")
    with ready.gm.graph.inserting_before(output):
        ready.gm.graph.call_function(torch.Tensor.item, (ready.gm.graph.call_function(torch.sum, (first,)),))
    ready.gm.recompile()
    assert refused(ready, {"hidden_states_1": 4}) is None


@pytest.mark.parametrize(
    ("numbers", "other", "size", "expected"),
    [
        (((4, 6),), 36, 64, ((4, 8),)),  # 4 x 4 patches become 6 x 6: 8 x 8 are 64
        (((4, 6),), 24, 64, ((4, 16),)),  # 4 x 4 become 6 x 4
        (((4, 6),), 36, 63, None),
        (((4, 6),), 25, 64, None),
        ((), 36, 63, ()),
    ],
)
def test_numbers_follow_the_size(numbers: Any, other: int, size: int, expected: Any) -> None:
    found = _at(Axis("a", (("x", 1),), 16, other, numbers), size)
    assert (None if found is None else found.numbers) == expected
