"""What NVIDIA's compiler makes of attention and of what stands around it, read from engines that it built here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import onnx_ir as ir
import pytest
import torch

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.export.kernels import FUSED_ATTENTION, kernels
from ppcl_fx.export.onnx.segments import Translations
from ppcl_fx.export.onnx.writer import prepare, translated
from ppcl_fx.tracing import trace
from tests.export.compiler import (
    BEGIN,
    END,
    NEEDS,
    PAGE,
    RANGES,
    TABLE,
    attention,
    build,
    fused,
    library,
    page,
)
from tests.export.test_attention import ATTENTIONS, MODELS

pytestmark = [pytest.mark.slow, NEEDS]

WRITTEN = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("kind", "size", "card"),
    [("bf16", 72, "8.9"), ("fp16", 128, "12.0"), ("fp16", 16, "7.5"), ("bf16", 64, "7.5"), ("fp32", 64, "8.9")],
)
def test_the_table_is_what_the_compiler_says(kind: str, size: int, card: str) -> None:
    assert WRITTEN["library"] == f"TensorRT for RTX {library().__version__}"
    assert fused(kind, size, card) == (card in WRITTEN["fused"][kind][str(size)])


def test_the_page_has_the_table() -> None:
    assert f"{BEGIN}{page(WRITTEN)}{END}" in PAGE.read_text(encoding="utf-8")


def test_attention_without_a_kernel_is_taken_apart_and_with_one_is_not() -> None:
    refused = build(attention("fp32", 64), RANGES, apart=False)
    assert refused.data is None
    assert "Attention operation was not supported by a dedicated kernel" in refused.said
    apart, whole = (build(attention(kind, 64), RANGES) for kind in ("fp32", "bf16"))
    assert (apart.attentions, whole.attentions) == (1, 1)
    assert apart.kernels[FUSED_ATTENTION] == 0
    assert apart.kernels["fully_connected"] == 2
    assert whole.kernels[FUSED_ATTENTION] == 1


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen", "bf16"), ("flux", "bf16"), ("sd3", "bf16"), ("masked", "bf16"), ("masked", "fp32")]
)
def test_attention_of_families(name: str, dtype: str) -> None:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    kwargs = floats_as(MODELS[name].kwargs(), kind)
    gm = trace(MODELS[name].build().to(kind), kwargs)
    model = translated(prepare(gm, kwargs, 2), Translations())
    ranges = defaultdict(lambda: (4, 8, 16), batch=(1, 2, 4))
    engine = build(ir.to_proto(model).SerializeToString(), ranges)
    assert engine.attentions == ATTENTIONS[name]
    assert engine.kernels[FUSED_ATTENTION] == (ATTENTIONS[name] if dtype == "bf16" else 0)
    # Norms, modulation, rotations and casts are kernels of several steps each.
    alone = {name for name in engine.kernels if name.removeprefix("__myl_") in ("Cast", "Mul", "Mean", "Sqrt", "Div")}
    assert alone == set()


def test_a_mask_of_truth_values_costs_kernels_in_each_attention() -> None:
    added = build(attention("bf16", 64, mask=True), RANGES).kernels
    assert added.total() == 2
    assert build(attention("bf16", 64, truth=True), RANGES).kernels.total() > 2 + added.total()


def test_kernels_are_read_from_what_an_engine_lists() -> None:
    listed = b"""plan
  function={ name=__myl_MulSum fqn=__myl_MulSum_0xe6a0f4abf0ddff71942aeac7bc43d6af args={ "a" } }
  function={ name=__myl_MulSum_0xe6a0f4abf0ddff71942aeac7bc43d6af fqn=x }
  fully_connected={ name="__fc441" output={"b" } }
  mul={ name="__mye147" output={"c" } }
"""
    assert kernels(listed) == Counter({"__myl_MulSum": 2, "fully_connected": 1})
    assert kernels(b"") == Counter()
