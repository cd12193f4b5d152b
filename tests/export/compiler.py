"""TensorRT for RTX as tests use it: small graphs built for one card without one, and which kernels came out.

``python -m tests.export.compiler`` writes `TABLE` anew and the page's table from it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from ppcl_fx.export.kernels import kernels, let_take_apart
from ppcl_fx.export.tensorrt_api import Api

NEEDS = pytest.mark.skipif(
    # The libraries come with the extra [dev], but for macOS.
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="needs the packages tensorrt-rtx-cu13-libs and -bindings",
)
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "data" / "attention_kernels.json"
PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- attention -->\n", "<!-- end of attention -->"

TYPES = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16, "fp32": onnx.TensorProto.FLOAT}
HEADS = (16, 32, 64, 72, 96, 128, 256)
CARDS = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
RANGES = {"batch": (1, 2, 4), "tokens": (16, 64, 256)}
"""Smallest, best and largest size of what the one-layer graphs leave open."""


def library() -> Any:
    """The real bindings, with their libraries loaded."""
    importlib.import_module("tensorrt_rtx_libs")
    return importlib.import_module("tensorrt_rtx_bindings")


@dataclass(frozen=True)
class Engine:
    """A built engine, or the compiler's words where it built none."""

    data: bytes | None
    said: str
    attentions: int

    @property
    def kernels(self) -> Counter[str]:
        """Its kernels by name."""
        assert self.data is not None, self.said
        return kernels(self.data)


def build(model: bytes, ranges: Mapping[str, tuple[int, int, int]], card: str = "8.9", apart: bool = True) -> Engine:
    """Build an ONNX graph whose open sizes are in `ranges`; with `apart` attention may be taken apart."""
    trt, said = library(), []

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), parser.get_error(0).desc()
    attentions = let_take_apart(Api(trt, None), network) if apart else 0  # type: ignore[arg-type]
    config = builder.create_builder_config()
    config.builder_optimization_level = 0
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, CARDS[card]), 0)
    profile = builder.create_optimization_profile()
    for value in onnx.load_from_string(model).graph.input:
        dims = value.type.tensor_type.shape.dim
        shapes = [[ranges[d.dim_param][kind] if d.dim_param else d.dim_value for d in dims] for kind in range(3)]
        if any(d.dim_param for d in dims):
            profile.set_shape(value.name, *shapes)
    config.add_optimization_profile(profile)
    data = builder.build_serialized_network(network, config)
    return Engine(None if data is None else bytes(memoryview(data)), " ".join(said), attentions)


def attention(kind: str, size: int, mask: bool = False, truth: bool = False) -> bytes:
    """A graph of one attention with two heads, in a type, with heads of a size, and with a mask: one that is added, or
    of truth values.
    """
    dtype = TYPES[kind]
    names = ["query", "key", "value"]
    inputs = [helper.make_tensor_value_info(name, dtype, ["batch", 2, "tokens", size]) for name in names]
    if mask or truth:
        masked = onnx.TensorProto.BOOL if truth else dtype
        inputs.append(helper.make_tensor_value_info("mask", masked, ["batch", 1, "tokens", "tokens"]))
    output = helper.make_tensor_value_info("output", dtype, ["batch", 2, "tokens", size])
    node = helper.make_node("Attention", [value.name for value in inputs], ["output"], name="attention")
    graph = helper.make_graph([node], "attention", inputs, [output])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return bytes(made.SerializeToString())


def fused(kind: str, size: int, card: str) -> bool:
    """Tell whether a card has a kernel for attention of a type and head size, with a mask and without."""
    return all(build(attention(kind, size, mask), RANGES, card, apart=False).data for mask in (False, True))


def measured() -> dict[str, Any]:
    """Ask the compiler about every type, head size and card."""
    found = {k: {str(s): [c for c in CARDS if fused(k, s, c)] for s in HEADS} for k in TYPES}
    return {"library": f"TensorRT for RTX {library().__version__}", "fused": found}


def page(table: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = ["| type | " + " | ".join(map(str, HEADS)) + " |", "| --- |" + " --- |" * len(HEADS)]
    for kind, sizes in table["fused"].items():
        lines.append(f"| {kind} | " + " | ".join(map(_cards, sizes.values())) + " |")
    return "\n".join(lines) + "\n"


def _cards(on: list[str]) -> str:
    """Say which cards have a kernel: mostly all from one on."""
    if on == list(CARDS)[-len(on) :]:
        return "all" if len(on) == len(CARDS) else f"from {on[0]}"
    return ", ".join(on) or "none"


def main() -> None:
    """Measure, and write the file and the page."""
    table = measured()
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + page(table) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
