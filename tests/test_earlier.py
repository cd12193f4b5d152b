"""What an earlier version wrote opens: calls, analysis, plan, students, checkpoints, a fine-tuned model, engines.

The files in ``tests/data/earlier`` were written by the version of commit 8e51e8f, on a Qwen-Image of five blocks of
width 16: `bounded` and `trained` ran to their end, `stopped` and `stopped_bounded` were killed on the way there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ppcl_fx
from ppcl_fx.cli.app import main

EARLIER = Path(__file__).parent / "data" / "earlier"
ENDS = {"stopped": "trained", "stopped_bounded": "bounded"}
OPTIONS = ["--held-out", "0.2", "--evaluate-every", "2", "--ema", "0.9", "--every", "2", "--resume"]
STAGES = {
    "stopped": ["--stage", "depth,width,finetune", "--steps", "6,4,4", "--keep", "0.7", "--no-tensorboard"],
    "stopped_bounded": ["--stage", "depth,width", "--steps", "6,4", "--memory-limit", "5GiB"],
}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy of the files, each training in a whole folder of its own."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    for name in ("trained", *ENDS, *ENDS.values()):
        shutil.copytree(folder / "student", folder / name, dirs_exist_ok=True)
        for file in (EARLIER / name).glob("*.safetensors"):
            shutil.copy(file, folder / name)
    weights = folder / "engines" / "weights"
    (weights / "teacher").mkdir(parents=True)
    shutil.copy(folder / "trained" / "students.safetensors", weights)
    shutil.copy(next((folder / "student" / "teacher").glob("*.safetensors")), weights / "teacher")
    return folder


def _losses(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "losses.json").read_text())["stages"]
    return found


def test_calls_analysis_and_plan_are_read(earlier: Path) -> None:
    calls = ppcl_fx.Calls.open(earlier / "run" / "calls")
    analysis = ppcl_fx.Redundancy.load(earlier / "run" / "analysis.json")
    assert [len(calls), calls[3].prompts, analysis.calls_used] == [12, ("p3a", "p3b"), 12]
    assert ppcl_fx.select(analysis, keep=0.8).params < 0.8 * analysis.teacher_params
    out = earlier / "rewritten"
    code = main(
        ["rewrite", str(earlier / "model"), "--plan", str(earlier / "plan.json"),
         "--calls", str(earlier / "run" / "calls"), "-o", str(out)]
    )  # fmt: skip
    assert code == 0
    then, now = (load_file(folder / "students.safetensors") for folder in (earlier / "student", out))
    torch.testing.assert_close(now, then)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_students_give_what_their_engines_give(backend: str, earlier: Path) -> None:
    kwargs = ppcl_fx.Calls.open(earlier / "run" / "calls")[0].kwargs
    model, engines = ppcl_fx.load(earlier / "trained"), ppcl_fx.EngineTransformer(earlier / "engines", backend=backend)
    for keep in (1.0, 0.7):
        with torch.no_grad():
            wanted, found = model.plug(keep=keep)(**kwargs)[0], engines.plug(keep=keep)(**kwargs)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ENDS)
def test_a_killed_training_goes_on_to_the_same_end(name: str, earlier: Path) -> None:
    folder, end = earlier / name, earlier / ENDS[name]
    assert main(["train", str(folder), "--calls", str(earlier / "run" / "calls"), *STAGES[name], *OPTIONS]) == 0
    for now, then in zip(_losses(folder), _losses(end), strict=True):
        assert now["losses"].keys() == then["losses"].keys()
        for edit, values in then["losses"].items():
            assert now["losses"][edit] == pytest.approx(values, rel=1e-4)
            assert [n for n, _ in now["held_out"][edit]] == [n for n, _ in then["held_out"][edit]]
    for file in end.rglob("*.safetensors"):
        if "teacher" not in file.parts:
            torch.testing.assert_close(load_file(folder / file.relative_to(end)), load_file(file), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["run", "student", "trained", "engines"])
def test_verify_finds_them_whole(name: str, earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(earlier / name)]) == 0, capsys.readouterr().err
