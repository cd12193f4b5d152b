"""`--memory-limit`: analysis and rewriting as a user types them, with the weights left on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.cli.app import main
from ppcl_fx.cli.terminal import time_words
from ppcl_fx.errors import PpclError
from ppcl_fx.io.memory import parse_size
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.costs import BlockCost, Costs, StackCost
from tests.passes.test_latency import milliseconds
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.kill

LIMIT = ("--memory-limit", "6GiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its calls and analysis, made without streaming."""
    folder = tmp_path_factory.mktemp("streaming")
    save_pipeline(folder / "model")
    (folder / "prompts.txt").write_text("a red circle\ntwo squares\n")
    arguments = [
        "analyze",
        folder / "model",
        "-o",
        folder / "run",
        "--prompts",
        folder / "prompts.txt",
        "--steps",
        2,
    ]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


class Program:
    """Runs the program in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *arguments: object) -> tuple[int, dict[str, Any]]:
        self.capture.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(self.capture.readouterr().out)


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Program:
    return Program(capfd)


def test_streamed_steps_give_what_the_plain_steps_give(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    model, calls = folder / "model", folder / "run" / "calls"
    code, found = program("analyze", model, "-o", tmp_path / "run", "--calls", calls, *LIMIT)
    assert code == 0, found
    mine, theirs = (
        Redundancy.load(tmp_path / "run" / "analysis.json"),
        Redundancy.load(folder / "run" / "analysis.json"),
    )
    assert (mine.model, mine.calls, mine.samples_used) == (theirs.model, theirs.calls, theirs.samples_used)
    for one, two in zip(mine.stacks, theirs.stacks, strict=True):
        assert one.savings == two.savings
        for name in one.streams:
            assert one.streams[name].fit == pytest.approx(two.streams[name].fit, rel=0, abs=1e-6)
    assert (tmp_path / "run" / "report.html").is_file()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["analysis.json", "report.html"]
    made = []
    for place, more in ((tmp_path / "plain", ()), (tmp_path / "streamed", LIMIT)):
        options = ["--analysis", tmp_path / "run" / "analysis.json", "--calls", calls, "--keep", 0.6]
        code, found = program("rewrite", model, "-o", place, *options, *more)
        assert code == 0, found
        made.append({name: value for name, value in found.items() if name != "student"})
    assert made[0] == made[1] and made[0]["keep"] <= 0.6
    assert ppcl_fx.load(tmp_path / "streamed").students == ppcl_fx.load(tmp_path / "plain").students


def test_rewriting_finds_the_calls_of_its_analysis(folder: Path, program: Program, tmp_path: Path) -> None:
    """Those beside it, where it was made from them; others only where they are named."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    given = ["rewrite", folder / "model", "--analysis", run / "analysis.json", "--keep", 0.6]
    code, found = program(*given, "-o", tmp_path / "one")
    assert code == 0, found
    calls = ppcl_fx.Calls.open(run / "calls")
    calls[:2].save(run / "calls", overwrite=True)
    code, found = program(*given, "-o", tmp_path / "two")
    assert code == 2 and not (tmp_path / "two").exists()
    assert "not the calls that" in found["error"] and "give those with --calls" in found["error"]
    code, found = program(*given, "-o", tmp_path / "two", "--calls", run / "calls")
    assert code == 0, found
    shutil.rmtree(run / "calls")
    code, found = program(*given, "-o", tmp_path / "three")
    assert code == 2 and "no such folder" in found["error"] and "--calls" in found["error"]


def test_a_budget_of_time(folder: Path, program: Program, tmp_path: Path) -> None:
    """Half of the time, by costs in which a block takes 2 ms; streamed too."""
    file = folder / "run" / "analysis.json"
    analysis = Redundancy.load(file)
    block = BlockCost(whole=2.0, ffn=1.5, text=1.0, text_last=1.25, text_last_ffn=1.0)
    stacks = [StackCost(path=s.path, first=s.first, blocks=[block] * len(s.blocks)) for s in analysis.stacks]
    costs = Costs(model=analysis.model, repeats=1, rest=1.0, stacks=stacks)
    costs.save(tmp_path / "costs.json")
    options = ["rewrite", folder / "model", "--analysis", file, "--costs", tmp_path / "costs.json"]
    cases: list[tuple[str, float | str, tuple[str, ...]]] = [
        ("share", 0.5, ()),
        ("ms", "6.5ms", ("--select", "budget", *LIMIT)),
    ]
    for place, latency, more in cases:
        code, found = program(*options, "--latency", latency, "-o", tmp_path / place, *more)
        assert code == 0, found
        assert "rule budget: at most 6.5 of 13 ms may stay; " in found["reason"][0]
        plan = ppcl_fx.select(analysis, config=RewriteConfig(latency=latency), costs=costs)
        assert found["edits"] == plan.ids and found["params"] == plan.params
        assert milliseconds(analysis, costs, plan.edits) <= 6.5
    costs.model_copy(update={"model": "0" * 64}).save(tmp_path / "costs.json")
    code, found = program(*options, "--latency", 0.5, "-o", tmp_path / "other")
    assert code == 2 and "the costs were measured on another model (fingerprint 000000000000" in found["error"]
    (tmp_path / "costs.json").write_text("{}")
    code, found = program(*options, "--latency", 0.5, "-o", tmp_path / "other")
    assert code == 2 and "costs.json" in found["error"] and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--latency", "0.5"], "--latency 0.5: what each block costs is not known; measure it with 'python -m benchma"),
        (["--costs", "c.json"], "--costs: is for --latency"),
        (["--latency", "0.5", "--costs", "c.json"], "c.json: no such file"),
        (["--latency", "0.5", "--costs", "c.json", "--keep", "0.5"], "--keep, --latency: give one of the two, a share"),
        (["--latency", "0.5", "--costs", "c.json", "--params", "1B"], "--params, --latency: give one of the two, a n"),
        (["--latency", "0.5", "--costs", "c.json", "--select", "paper"], "--latency, --select paper: this rule knows"),
        (["--latency", "0.5", "--costs", "c.json", "--select", "uniform"], "--select uniform: this rule knows no time"),
        (["--latency", "0.5", "--plan", "paper:qwen-image-12b"], "--latency: a plan has its size already"),
    ],
)
def test_bad_budgets_of_time(arguments: list[str], part: str, program: Program, tmp_path: Path) -> None:
    code, found = program("rewrite", "shapes", "--analysis", "a.json", "-o", tmp_path / "student", *arguments)
    assert code == 2 and part in found["error"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--memory-limit", "much"], "--memory-limit much: not a size; give for example 12GiB"),
        (["--memory-limit", "0"], "--memory-limit 0: a size is at least one byte"),
        (["--memory-limit", "12GiB"], "so nothing can be recorded; give --calls FOLDER"),
        (["--device", "cuda"], "--device cuda: only block by block; give --memory-limit too"),
        (["--device", "nowhere", "--memory-limit", "12GiB"], "--device nowhere: no device"),
    ],
)
def test_bad_options(arguments: list[str], part: str, folder: Path, program: Program, tmp_path: Path) -> None:
    code, found = program("analyze", folder / "model", "-o", tmp_path / "run", *arguments)
    assert code == 2 and part in found["error"]


def test_a_limit_that_is_too_small(folder: Path, program: Program, tmp_path: Path) -> None:
    options = ["--calls", folder / "run" / "calls", "--memory-limit", "2MiB"]
    code, found = program("analyze", folder / "model", "-o", tmp_path / "run", *options)
    assert code == 2 and "too small for this model and these calls; give at least" in found["error"]


def test_calls_of_another_model(folder: Path, program: Program, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "other", seed=1)
    options = ["--calls", folder / "run" / "calls", *LIMIT]
    code, found = program("analyze", tmp_path / "other", "-o", tmp_path / "run", *options)
    assert code == 2 and "made for another model" in found["error"]


def test_a_killed_analysis_goes_on(folder: Path, program: Program, tmp_path: Path) -> None:
    """Killed for good (SIGKILL) once two blocks are done, the same command finishes with the same numbers."""
    arguments = [
        "analyze",
        folder / "model",
        "-o",
        tmp_path / "run",
        "--calls",
        folder / "run" / "calls",
        *LIMIT,
    ]
    slow = (
        "import sys, time\n"
        "from ppcl_fx.passes.calibration import calibration\n"
        "calibration.CHECKPOINT_SECONDS = 0.0\n"
        "from ppcl_fx.passes.calibration.run_store import RunStore\n"
        "finish = RunStore.finish\n"
        "def slowly(self, cut):\n"
        "    finish(self, cut)\n"
        "    time.sleep(1e9 if cut == 3 else 0)\n"
        "RunStore.finish = slowly\n"
        "from ppcl_fx.cli.app import main\n"
        "main(sys.argv[1:])\n"
    )
    # As many threads as here: sums over another number of them differ in the last bits.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", slow, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env)
    progress = tmp_path / "run" / "unfinished" / "progress.json"
    deadline = time.monotonic() + 300
    while not (progress.is_file() and json.loads(progress.read_text())["cut"] == 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "analysis.json").exists()
    code, found = program(*arguments)
    assert code == 0, found
    assert not progress.exists()
    options = ["--calls", folder / "run" / "calls", *LIMIT]
    assert program("analyze", folder / "model", "-o", tmp_path / "whole", *options)[0] == 0
    whole = Redundancy.load(tmp_path / "whole" / "analysis.json")
    assert Redundancy.load(tmp_path / "run" / "analysis.json") == whole


def test_sizes() -> None:
    assert [parse_size("-x", text) for text in ("12GiB", "1.5 gib", "900MB", "64k", "7")] == [
        12 * 2**30,
        3 * 2**29,
        900 * 10**6,
        65536,
        7,
    ]
    for text in ("", "GiB", "-1GiB", "1e3", "12 parsecs"):
        with pytest.raises(PpclError, match="not a size"):
            parse_size("-x", text)


def test_times() -> None:
    assert [time_words(seconds) for seconds in (3, 119, 200, 7500)] == ["3 s", "2 min", "3 min", "2 h 5 min"]
