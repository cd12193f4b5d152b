"""The benchmark of engines of real size, at a small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engine
from tests.export.compiler import NEEDS

pytestmark = [pytest.mark.slow, NEEDS]


def test_a_result_holds_what_the_builder_took(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--blocks", "1", "--heads", "1", "--scratch", str(tmp_path)]
    assert engine.main([*sizes, "--weights", "int4", "--out", str(out)]) == out
    (row,) = json.loads(out.read_text())["table"]
    # Two weights a byte, and a scale of two bytes for 64 of them; biases and norms are all else.
    assert 0.5 < row["weight_bytes"] / row["params"] < 0.6 and row["engine_bytes"] > 0.9 * row["weight_bytes"]
    assert row["peak_resident_gib"] > 0 and row["capabilities"] == ["8.9"]
    assert list(tmp_path.iterdir()) == [out]
