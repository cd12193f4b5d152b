"""The benchmark of latencies: its structure and its exact counts at tiny size, never its times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import latency
from benchmarks.latency_models import TABLE_1, specs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "runtimes", "blocks"),
    [
        ("qwen", ["eager", "onnxruntime", "tensorrt"], [{"transformer_blocks": 6}, {"transformer_blocks": 4}]),
        (
            "flux",
            ["eager"],
            [
                {"transformer_blocks": 4, "single_transformer_blocks": 4},
                {"transformer_blocks": 2, "single_transformer_blocks": 3},
            ],
        ),
    ],
)
def test_each_variant_has_its_row_and_what_is_not_there_its_reason(
    name: str,
    runtimes: list[str],
    blocks: list[dict[str, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without torch.compile, whose C++ compiler takes a minute even for models as small as these.
    arguments = ["--size", "tiny", "--models", name, "--runtimes", ",".join(runtimes), "--repeats", "2"]
    out = latency.main([*arguments, "--note", "a test", "--out", str(tmp_path / "r.json")])
    result = json.loads(out.read_text())
    assert result["conditions"] == "a test" and result["weights"] == "random" and result["size"] == "tiny"
    (spec,), (found,) = specs("tiny", None, [name]), result["models"]
    model = spec.pluggable()
    assert found["name"] == name and list(found["runtimes"]) == runtimes
    expected = [model.param_count(ratio.students(model)) for ratio in spec.ratios]
    assert found["teacher_params"] == expected[0] > expected[1]
    for runtime in runtimes:
        if runtime == "tensorrt":
            assert found["runtimes"][runtime] == {"not_measured": ["TensorRT runs on NVIDIA GPUs, not on cpu"]}
        else:
            _check_rows(found["runtimes"][runtime], expected, blocks)
    shown = capsys.readouterr().out
    assert ("tensorrt      not measured: TensorRT runs on" in shown) == ("tensorrt" in runtimes)
    assert f"paper: {TABLE_1[spec.ratios[1].paper].speedup:.2f}x" in shown


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
    assert (qwen.teacher_params(), flux.teacher_params()) == (20_430_401_088, 11_901_408_320)
    # Of the others the budget decides, in as many counts as there are edits: that takes a minute.
    model = qwen.pluggable()
    plugged = {ratio.paper: ratio.students(model) for ratio in qwen.ratios if "14b" not in ratio.plan}
    assert plugged[""] == () and list(plugged["qwen-image-10b"]) == model.edits
    assert model.param_count(plugged["qwen-image-12b"]) == 11_934_618_688
    assert model.param_count(plugged["qwen-image-10b"]) == 10_528_131_136
    assert latency.blocks_left(model, plugged["qwen-image-12b"]) == {"transformer_blocks": 35}
    for ratio, billions in zip(qwen.ratios[1:], (14, 12, 10.5281311361), strict=True):
        # An export goes by the share: it must leave room for these students, and not for the next larger ones.
        assert 0 <= billions * 1e9 / qwen.teacher_params() - ratio.keep + 1e-4 < 2e-4
    model = flux.pluggable()
    assert model.param_count(flux.ratios[-1].students(model)) == 6_520_810_048 <= 0.548 * flux.teacher_params()
    left = latency.blocks_left(model, model.edits)
    assert left == {"transformer_blocks": 9, "single_transformer_blocks": 24}


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
