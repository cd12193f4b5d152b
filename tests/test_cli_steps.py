"""The four steps on a small random model folder, as a user types them."""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

import ppcl_fx
from ppcl_fx.cli.app import main
from ppcl_fx.io.files import read_safetensors
from ppcl_fx.shapes import drawing
from ppcl_fx.shapes.captions import parse
from tests.cli_place import Place
from tests.shapes_folder import BLOCKS, save_pipeline

pytestmark = pytest.mark.slow

PROMPTS = ("a red circle", "two squares")
STEPS = 2
PLAN = {
    "edits": [
        {"kind": "depth", "stack": "transformer_blocks", "first": 1, "last": 3},
        {"kind": "ffn", "stack": "transformer_blocks", "block": 4},
    ]
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, its calls and analysis, and a student by a plan: made once, copied for each test."""
    folder = tmp_path_factory.mktemp("steps")
    place = Place(folder)
    save_pipeline(place.model)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    place.plan.write_text(json.dumps(PLAN), encoding="utf-8")
    analyze = ["analyze", place.model, "-o", place.run, "--prompts", prompts, "--steps", STEPS]
    assert main([*map(str, analyze)]) == 0
    rewrite = ["rewrite", place.model, "--plan", place.plan, "--calls", place.calls, "-o", place.student]
    assert main([*map(str, rewrite)]) == 0
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], translated_once: None) -> Place:
    """The prepared folder, copied."""
    shutil.copytree(prepared, tmp_path / "copy")
    return Place(tmp_path / "copy", capfd)


def test_analyze_records_and_writes_three_results(place: Place) -> None:
    assert {path.name for path in place.run.iterdir()} == {"calls", "analysis.json", "report.html"}
    calls = ppcl_fx.Calls.open(place.calls)
    assert len(calls) == 2 * STEPS  # both branches of guidance
    assert set(calls[0].prompts) == set(PROMPTS)
    analysis = ppcl_fx.Redundancy.load(place.run / "analysis.json")
    assert (analysis.model, analysis.calls) == (calls.model, calls.fingerprint)
    assert [len(stack.blocks) for stack in analysis.stacks] == [BLOCKS]
    assert (place.run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_analyze_can_use_recorded_calls_again(place: Place) -> None:
    said = place.ok("analyze", place.model, "--calls", place.calls, "-o", place.folder / "again")
    first = ppcl_fx.Redundancy.load(place.run / "analysis.json")
    assert ppcl_fx.Redundancy.load(said["analysis"]) == first
    assert (said["calls"], said["params"], said["blocks"]) == (str(place.calls), first.teacher_params, BLOCKS)


def test_results_are_not_overwritten_unasked(place: Place) -> None:
    before = (place.run / "analysis.json").stat().st_mtime_ns
    line = place.refused("analyze", place.model, "-o", place.run, "--prompts", place.folder / "prompts.txt")
    assert "already exists" in line
    assert "--overwrite" in line
    line = place.refused("rewrite", place.model, "--plan", place.plan, "-o", place.student)
    assert "--overwrite" in line
    assert (place.run / "analysis.json").stat().st_mtime_ns == before


def test_rewrite_meets_the_budget_to_the_parameter(place: Place) -> None:
    out = place.folder / "half"
    said = place.ok(
        "rewrite", place.model, "--analysis", place.run / "analysis.json", "--keep", "0.6", "-o", out
    )
    model = ppcl_fx.load(out)
    assert said["params"] == model.param_count() == model.param_count(said["edits"])
    assert said["teacher_params"] == model.teacher_params
    assert said["keep"] == said["params"] / said["teacher_params"] <= 0.6
    assert list(model.students) == model.edits == said["edits"]


def test_with_every_edit_switched_back_the_student_is_the_teacher(place: Place) -> None:
    from ppcl_fx.model.sources import open_source

    model = ppcl_fx.load(place.student)
    teacher = open_source(str(place.model)).transformer()
    kwargs = ppcl_fx.Calls.open(place.calls).examples()
    with torch.no_grad():
        expected = teacher(**kwargs)[0]
        assert torch.equal(model.plug(students=[])(**kwargs)[0], expected)
        assert not torch.equal(model.plug(students=model.edits)(**kwargs)[0], expected)


def test_train_changes_the_students_in_place_and_nothing_else(place: Place) -> None:
    teacher = place.student / "teacher" / "diffusion_pytorch_model.safetensors"
    before, weights = read_safetensors(place.student / "students.safetensors"), teacher.read_bytes()
    before = {name: tensor.clone() for name, tensor in before.items()}
    said = place.ok("train", place.student, "--calls", place.calls, "--steps", "3,2,2", "--every", "2")
    after = read_safetensors(place.student / "students.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("students.") for name in changed)
    assert any(name.startswith("projectors.") for name in changed)
    assert teacher.read_bytes() == weights
    assert [(stage["stage"], stage["steps"]) for stage in said["stages"]] == [
        ("depth", 3),
        ("width", 2),
        ("finetune", 2),
    ]
    for name in ("losses", "checkpoints", "finetuned", "report"):
        assert Path(said[name]).is_relative_to(place.student)
        assert Path(said[name]).exists()


def test_a_resumed_training_ends_where_an_unbroken_one_does(place: Place) -> None:
    options = ["--calls", place.calls, "--stage", "depth", "--steps", "4", "--every", "2"]
    other = place.folder / "other"
    shutil.copytree(place.student, other)
    place.ok("train", place.student, *options)
    place.ok("train", other, *options)
    latest = sorted((other / "checkpoints").iterdir())
    assert latest, "no checkpoint was written"
    resumed = place.ok("train", other, *options, "--resume")
    assert resumed["stages"][0]["steps"] == 4
    one, two = (read_safetensors(folder / "students.safetensors") for folder in (place.student, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_under_a_memory_limit_gives_the_same_losses(place: Place) -> None:
    plain = place.folder / "plain"
    shutil.copytree(place.student, plain)
    how = ["--calls", place.calls, "--stage", "depth,width", "--steps", "2,1", "--batch", 1]
    how += ["--held-out", 0.3, "--evaluate-every", 1, "--patience", 1, "--ema", 0.5]
    before = read_safetensors(place.student / "students.safetensors")
    said = place.ok("train", place.student, *how, "--dry-run", "--memory-limit", "4GiB")
    assert any("memory" in line for line in said["schedule"]) and "losses" not in said
    after = read_safetensors(place.student / "students.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    bounded = place.ok("train", place.student, *how, "--memory-limit", "4GiB", "--disk-limit", "1GiB")
    trained = read_safetensors(place.student / "students.safetensors")
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    for mine, theirs in zip(bounded["stages"], place.ok("train", plain, *how)["stages"], strict=True):
        assert mine["stage"] == theirs["stage"] and mine["last"] == pytest.approx(theirs["last"], rel=1e-5)
        assert mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
        assert mine["held_out"] and mine["stopped"].keys() == theirs["stopped"].keys()
    assert (place.student / "report.html").is_file()
    for options, words in (
        (["--memory-limit", "4GiB", "--sequential"], "training option sequential: not with --memory-limit"),
        (["--memory-limit", "4GiB", "--stage", "finetune", "--steps", 1], "stage finetune trains a whole mixture"),
        (["--disk-limit", "4GiB"], "--disk-limit: only with --memory-limit"),
        (["--device", "cpu:1x"], "--device cpu:1x"),
        (["--memory-limit", "1MiB"], "memory"),
        (["--memory-limit", "4GiB", "--stage", "depth", "--steps", 1, "--patience", 1], "patience: needs held-out"),
    ):
        assert words in place.refused("train", place.student, "--calls", place.calls, *options)


def test_train_records_prompts_as_it_goes(place: Place) -> None:
    how = ["--prompts", place.folder / "prompts.txt", "--stage", "depth,finetune", "--steps", "3,2"]
    before = read_safetensors(place.student / "students.safetensors")
    said = place.ok("train", place.student, *how, "--pipeline", place.model)
    assert [stage["steps"] for stage in said["stages"]] == [3, 2]
    after = read_safetensors(place.student / "students.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    (recorded,) = (place.student / "recorded").iterdir()
    assert [part.name for part in recorded.iterdir()] == ["part-00000"]
    for options, words in (
        (how, "--prompts: needs the teacher's pipeline; give --pipeline MODEL"),
        ([*how, "--calls", place.calls], "--calls and --prompts: give one of --calls, --prompts, --images"),
        ([*how, "--pipeline", "shapes"], "--pipeline shapes: not the teacher of"),
        ([*how, "--pipeline", place.model / "transformer"], "a bare transformer draws nothing"),
        ([*how, "--pipeline", place.model, "--memory-limit", "4GiB"], "only with recorded calls"),
        ([*how, "--pipeline", place.model, "--held-out", 0.5], "only recorded calls can be held out"),
        (["--calls", place.calls, "--pipeline", place.model], "--pipeline: recorded calls need none"),
    ):
        assert words in place.refused("train", place.student, *options)


def test_train_takes_pictures_with_captions(place: Place) -> None:
    pictures = place.folder / "pictures"
    pictures.mkdir()
    drawn = drawing.draw_prompts([parse(text) for text in PROMPTS], random.Random(0))
    for number, picture in enumerate(drawn):
        array = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(pictures / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(PROMPTS)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    how = ["--images", pictures, "--pipeline", place.model, "--stage", "depth", "--steps", "3"]
    said = place.ok("train", place.student, *how)
    assert [stage["steps"] for stage in said["stages"]] == [3]
    assert (place.student / "encoded").is_dir()


def test_train_takes_a_file_with_the_command_line_on_top(place: Place) -> None:
    file = place.folder / "mine.toml"
    text = 'stages = ["depth"]\nsteps = [9]\nlr = 1e-4\nema = 0.5\n[weights]\nrelative = 1.0\n'
    file.write_text(text, encoding="utf-8")
    options = ["--calls", place.calls, "--config", file, "--steps", "2", "--ema", "none", "--weights", "text=0.5"]
    said = place.ok("train", place.student, *options, "--held-out", "0.3")
    assert [(stage["stage"], stage["steps"]) for stage in said["stages"]] == [("depth", 2)]
    assert said["stages"][0]["held_out"].keys() == said["stages"][0]["last"].keys()
    used = tomllib.loads((place.student / "train.toml").read_text(encoding="utf-8"))
    assert (used["steps"], used["lr"], used["ema"]) == ([2], 1e-4, "none")
    assert (used["weights"]["relative"], used["weights"]["text"]) == (1.0, 0.5)
    rows = [json.loads(line) for line in (place.student / "logs" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    again = place.ok("train", place.student, "--calls", place.calls, "--config", place.student / "train.toml")
    assert again["stages"][0]["last"] != said["stages"][0]["last"], "the students were trained before"
    file.write_text("learning_rte = 1\n", encoding="utf-8")
    line = place.refused("train", place.student, "--calls", place.calls, "--config", file)
    assert "mine.toml: unknown training option 'learning_rte'" in line
    line = place.refused("train", place.student, "--calls", place.calls, "--score-prompts", "1")
    assert "only students of the shipped 'shapes' model" in line


def test_what_training_measured_decides_what_is_exported(place: Place) -> None:
    short = ["--calls", place.calls, "--stage", "depth,width", "--steps", "1,1", "--held-out", "0.3"]
    said = place.ok("train", place.student, *short, "--effects", "1")
    found = json.loads((place.student / "effects.json").read_text(encoding="utf-8"))
    assert said["effects"] == found
    assert len(found["mixtures"]) >= 5
    assert all(edit["loss"] is not None for edit in found["edits"])
    assert 'id="effects"' in (place.student / "report.html").read_text(encoding="utf-8")
    # The file decides, not the plan: with the depth edit the worse one, the projector alone meets the budget.
    ffn = found["edits"][1]["edit"]
    found["edits"][0]["error"], found["edits"][1]["error"] = 0.9, 0.1
    (place.student / "effects.json").write_text(json.dumps(found), encoding="utf-8")
    model = ppcl_fx.load(place.student)
    share = f"{model.param_count([ffn]) / model.teacher_params + 1e-4:.4f}"
    (one,) = place.ok("export", place.student, "--format", "released", "--keep", share, "-o", place.folder / "out")[
        "folders"
    ]
    assert one["plugged"] == [ffn]
    found["plan"] = "0" * 64
    (place.student / "effects.json").write_text(json.dumps(found), encoding="utf-8")
    line = place.refused("export", place.student, "--format", "released", "-o", place.folder / "other")
    assert "effects.json: measured for another plan or model" in line


def test_export_writes_a_checked_file_for_a_share(place: Place) -> None:
    pytest.importorskip("onnxruntime")
    model = ppcl_fx.load(place.student)
    least = model.param_count(model.edits)
    share = f"{least / model.teacher_params + 1e-4:.4f}"
    given = ["--keep", share, "-o", place.folder / "engines", "--runs", 1, "--calls", place.calls, "--check-calls", 3]
    against = ["--pipeline", place.model, "--samples", 1, "--sample-steps", 2]
    (ratio,) = place.ok("export", place.student, *given, *against)["ratios"]
    assert (ratio["keep"], ratio["params"], Path(ratio["onnx"]).is_file()) == (float(share), least, True)
    calls, run = ratio["gate"]["calls"], ratio["gate"]["sampling"]
    assert calls["compared"] == 3 and 0 < calls["relative"] < 1e-5 and ratio["parity_max_abs"] <= 1e-4
    assert (run["compared"], run["transformer_calls"], ratio["gate"]["not_checked"]) == (1, 4, [])


def test_what_engines_are_built_from_is_exported_for_another_machine(place: Place) -> None:
    pytest.importorskip("onnxruntime")
    from ppcl_fx.export import check_artefacts
    from ppcl_fx.export.runtime.folder import artefacts
    from ppcl_fx.export.tensorrt.request import read_request

    out = place.folder / "engines"
    given = ["--keep", "1.0", "--runs", 1, "--calls", place.calls, "--batch", "1-4", "--text", "1-6"]
    line = place.refused("export", place.student, "-o", out, "--format", "tensorrt", "--tokens", "0", *given)
    assert "--tokens 0: a size of 0" in line and not out.exists()
    given += ["--tokens", "64-256", "--stripped"]
    said = place.ok("export", place.student, "-o", out, "--format", "trtexec", *given)
    script = Path(said["script"]).read_text(encoding="utf-8")
    assert "--onnx=keep-1.bf16.onnx" in script and "--stripWeights" in script
    assert "--minShapes=hidden_states:1x64x" in script and "--maxShapes=hidden_states:4x256x" in script
    request = read_request(out)
    assert request.options.stripped and request.spec.tokens == "64-256" and request.example["batch"] >= 2
    # The graph for the engine is in bfloat16, with a manifest of its own; the one that was compared stays.
    cards = {card.file: card for card in check_artefacts(out)}
    plain, typed = cards["keep-1.onnx"], cards["keep-1.bf16.onnx"]
    assert (plain.dtype, typed.dtype, len(cards)) == ("float32", "bfloat16", 2)
    assert plain.unchecked is None and plain.half is None
    assert typed.unchecked is None and typed.half is not None and 0 < typed.half.rounding < 0.05
    assert [weights.file for weights in typed.weights] == ["weights/bfloat16.safetensors"]
    assert list(artefacts(out)) == [1.0] and artefacts(out)[1.0].graph.name == "keep-1.onnx"
    # The other machine, which this one is not: everything but the GPU was found.
    line = place.refused("build", out)
    assert f"the ONNX files stay in {out}" in line
    line = place.refused("build", out, "--text", "1-9999999", "--tokens", "5", "--size", "x=1")
    assert "no open size 'x'" in line


def test_a_budget_in_parameters_is_met_with_the_least_damage(place: Place) -> None:
    analysis, out = place.run / "analysis.json", place.folder / "budget"
    whole = ppcl_fx.Redundancy.load(analysis).teacher_params
    budget = f"{0.7 * whole / 1000:.3f}K"
    said = place.ok(
        "rewrite", place.model, "--analysis", analysis, "--select", "budget", "--params", budget, "-o", out
    )
    assert said["params"] == ppcl_fx.load(out).param_count() <= 0.7 * whole
    assert "least predicted damage" in said["reason"][1]
    line = place.refused("rewrite", place.model, "--analysis", analysis, "--params", "20B", "-o", out / "x")
    assert "must lie between 1 and" in line


def test_folders_that_others_load(place: Place) -> None:
    model = ppcl_fx.load(place.student)
    depth, ffn = model.edits
    share = f"{model.param_count([depth]) / model.teacher_params + 1e-4:.4f}"
    out = place.folder / "stock"
    (one,) = place.ok("export", place.student, "--format", "diffusers", "--keep", share, "-o", out)["folders"]
    assert (one["plugged"], one["params"]) == ([depth], model.param_count([depth]))
    loaded = diffusers.QwenImageTransformer2DModel.from_pretrained(one["folder"])
    kwargs = ppcl_fx.Calls.open(place.calls).examples()
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], model.plug(students=[depth])(**kwargs)[0])
    least = f"{model.param_count(model.edits) / model.teacher_params + 1e-4:.4f}"
    line = place.refused("export", place.student, "--format", "diffusers", "--keep", f"1.0,{least}", "-o", out / "x")
    assert ffn in line and "no class of diffusers" in line
    assert not (out / "x").exists()


def test_a_released_checkpoint_comes_and_goes(place: Place) -> None:
    model = ppcl_fx.load(place.student)
    share = f"{model.param_count(model.edits) / model.teacher_params + 1e-4:.4f}"
    out, joined = place.folder / "out", place.folder / "joined"
    (one,) = place.ok("export", place.student, "--format", "released", "--keep", share, "-o", out)["folders"]
    said = place.ok("rewrite", place.model, "--released", one["folder"], "--calls", place.calls, "-o", joined)
    assert said["edits"] == said["plugged"] == model.edits
    kwargs = ppcl_fx.Calls.open(place.calls).examples()
    again = ppcl_fx.load(joined)
    for students in (model.edits, [], model.edits[:1]):
        with torch.no_grad():
            ours, theirs = again.plug(students=students), model.plug(students=students)
            assert torch.equal(ours(**kwargs)[0], theirs(**kwargs)[0])
    line = place.refused("train", one["folder"], "--calls", place.calls)
    assert "without its teacher" in line and "--released" in line
    config = Path(one["folder"]) / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 4', '"num_layers": 3'))
    line = place.refused("rewrite", place.model, "--released", one["folder"], "--calls", place.calls, "-o", out / "x")
    assert "num_layers is 3" in line or "too much" in line
    assert not (out / "x").exists()


def test_files_of_another_model_are_refused(place: Place) -> None:
    other = save_pipeline(place.folder / "other", seed=1)
    line = place.refused("analyze", other, "--calls", place.calls, "-o", place.folder / "x")
    assert str(place.calls) in line
    assert "another model" in line
    analysis = place.run / "analysis.json"
    line = place.refused("rewrite", other, "--analysis", analysis, "-o", place.folder / "x")
    assert str(analysis) in line
    assert "another model" in line
    assert not (place.folder / "x").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"kind": "depth", "stack": "transformer_blocks", "first": 3, "last": 4}, "overlap"),
        ({"kind": "depth", "stack": "transformer_blocks", "first": 4, "last": 9}, "9"),
        ({"kind": "depht", "stack": "transformer_blocks", "first": 4, "last": 5}, "depht"),
    ],
)
def test_bad_plans_are_refused_in_one_line(place: Place, edit: dict[str, Any], words: str) -> None:
    place.plan.write_text(json.dumps({"edits": [PLAN["edits"][0], edit]}), encoding="utf-8")
    line = place.refused(
        "rewrite", place.model, "--plan", place.plan, "--calls", place.calls, "-o", place.folder / "x"
    )
    assert words in line
    assert not (place.folder / "x").exists()


def test_missing_and_damaged_inputs_are_refused_in_one_line(place: Place) -> None:
    x = place.folder / "x"
    assert "no such model" in place.refused("analyze", place.folder / "modle", "-o", x)
    assert "give --prompts" in place.refused("analyze", place.model, "-o", x)
    bare = place.model / "transformer"
    assert "bare transformer" in place.refused("analyze", bare, "-o", x)
    assert "no such file" in place.refused("analyze", place.model, "-o", x, "--prompts", x).lower()
    assert "no such file" in place.refused("rewrite", place.model, "--analysis", x / "analysis.json", "-o", x)
    assert "no such folder" in place.refused("train", x, "--calls", place.calls)
    assert "no such folder" in place.refused("train", place.student, "--calls", x)
    assert "no such folder" in place.refused("export", x, "-o", x / "y")
    (shard,) = place.calls.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "truncated" in place.refused("train", place.student, "--calls", place.calls)
    assert not x.exists()
