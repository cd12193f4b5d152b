"""The benchmark of latencies: its structure and its exact counts at tiny size, never its times."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import latency
from benchmarks.latency_models import TABLE_1, specs
from benchmarks.latency_worker import RUNTIMES
from ppcl_fx.plans import named


def test_each_variant_has_its_row_and_what_is_not_there_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = latency.main(["--size", "tiny", "--repeats", "2", "--note", "a test", "--out", str(tmp_path / "r.json")])
    result = json.loads(out.read_text())
    assert result["conditions"] == "a test" and result["weights"] == "random" and result["size"] == "tiny"
    counts = {"qwen": [{"transformer_blocks": 6}, {"transformer_blocks": 4}]}
    counts["flux"] = [
        {"transformer_blocks": 4, "single_transformer_blocks": 4},
        {"transformer_blocks": 2, "single_transformer_blocks": 3},
    ]
    for spec, found in zip(specs("tiny", None, []), result["models"], strict=True):
        model = spec.pluggable()
        assert found["name"] == spec.name and list(found["runtimes"]) == list(RUNTIMES)
        expected = [model.plug(keep=ratio.keep).param_count() for ratio in spec.ratios]
        assert found["teacher_params"] == expected[0] > expected[1]
        for runtime in ("eager", "onnxruntime"):
            _check_rows(found["runtimes"][runtime], expected, counts[spec.name])
        compiled = found["runtimes"]["torch.compile"]
        if shutil.which("g++"):
            _check_rows(compiled, expected, counts[spec.name])
        else:
            assert len(compiled["not_measured"]) == 1
        assert found["runtimes"]["tensorrt"] == {"not_measured": ["TensorRT runs on NVIDIA GPUs, not on cpu"]}
    shown = capsys.readouterr().out
    assert "tensorrt      not measured: TensorRT runs on" in shown and "paper: 1.73x, 71.4 %" in shown


def _check_rows(found: dict[str, Any], params: list[int], blocks: list[dict[str, int]]) -> None:
    assert found["not_measured"] == [] and found["turns"] == "alternating" and found["repeats"] == 2
    assert found["block_ms"].keys() == blocks[0].keys() and min(found["block_ms"].values()) > 0
    teacher, student = found["rows"]
    assert [row["params"] for row in found["rows"]] == params
    assert [row["blocks"] for row in found["rows"]] == blocks
    assert teacher["speedup"] == 1 and teacher["memory_pct"] == 100 and "paper" not in teacher
    assert student["share"] == round(params[1] / params[0], 4) <= 0.7 and student["ms"] > 0
    total = sum(found["block_ms"][name] * count for name, count in blocks[1].items())
    assert student["blocks_times_count_ms"] == pytest.approx(total, abs=1e-2)
    assert student["paper"]["speedup"] in (1.34, 1.73)


def test_the_full_sizes_are_those_of_the_papers_plans() -> None:
    qwen, flux = specs("full", None, [])
    assert qwen.torch_dtype == flux.torch_dtype == torch.bfloat16
    model = qwen.pluggable()
    sizes = {ratio.paper: model.plug(keep=ratio.keep).param_count() for ratio in qwen.ratios}
    assert sizes[""] == 20_430_401_088
    assert sizes["qwen-image-12b"] == named("paper:qwen-image-12b").params == 11_934_618_688
    assert sizes["qwen-image-10b"] == named("paper:qwen-image-10b").params == 10_528_131_136
    by_name = named("paper:qwen-image-14b").students(model)
    assert sizes["qwen-image-14b"] == model.param_count(by_name) <= 14_000_000_000
    model = flux.pluggable()
    counts = [model.plug(keep=ratio.keep).param_count() for ratio in flux.ratios]
    eight = model.param_count(named("paper:flux-dev-8b").students(model))
    assert counts == [11_901_408_320, eight, 6_520_810_048]
    assert latency.blocks_left(model) == {"transformer_blocks": 9, "single_transformer_blocks": 24}


def test_table_1_is_as_the_paper_prints_it() -> None:
    speedups = {name: (paper.speedup, paper.memory_pct) for name, paper in TABLE_1.items()}
    assert speedups == {
        "qwen-image-14b": (1.46, 79.4),
        "qwen-image-12b": (1.73, 71.4),
        "qwen-image-10b": (1.80, 66.9),
        "flux-dev-8b": (1.34, 74.4),
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "fool"], "--size fool: no such size (did you mean 'full'?)"),
        (["--size", "tiny", "--models", "flax"], "--models flax: not at size tiny (did you mean 'flux'?)"),
        (["--size", "tiny", "--runtimes", "eagre"], "--runtimes eagre: no such runtime (did you mean 'eager'?)"),
        (["--size", "tiny", "--repeats", "1"], "--repeats: two or more"),
        (["--size", "full", "--models", "qwen"], "the teacher needs 42.36 GiB on cpu, and 4.00 GiB are free"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_begins(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "free_memory", lambda device: 4 * 2**30)
    with pytest.raises(SystemExit) as stop:
        latency.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


def test_variants_that_do_not_fit_together_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "free_memory", lambda device: 700 * 2**20)  # one process, and not two
    arguments = ["--size", "tiny", "--models", "qwen", "--runtimes", "eager", "--repeats", "2"]
    result = json.loads(latency.main([*arguments, "--out", str(tmp_path / "r.json")]).read_text())
    found = result["models"][0]["runtimes"]["eager"]
    assert found["turns"] == "one after another" and found["not_measured"] == []
    assert found["rows"][1]["speedup"] > 0 and found["rows"][1]["speedup_quartiles"] is None
