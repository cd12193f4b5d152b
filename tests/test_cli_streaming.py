"""`--memory-limit`: analysis and rewriting as a user types them, with the weights left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ppcl_fx
from ppcl_fx.cli.app import main
from ppcl_fx.cli.terminal import time_words
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size
from ppcl_fx.redundancy import Redundancy
from tests.shapes_folder import save_pipeline

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


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--memory-limit", "much"], "--memory-limit much: not a size; give for example 12GiB"),
        (["--memory-limit", "0"], "--memory-limit 0: not a size"),
        (["--memory-limit", "12GiB"], "so nothing can be recorded; give --calls FOLDER"),
        (["--device", "cuda"], "--device cuda: only block by block; give --memory-limit too"),
        (["--device", "nowhere", "--memory-limit", "12GiB"], "--device nowhere: not here"),
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
        "from ppcl_fx.passes.streaming import measure as streamed\n"
        "streamed.CHECKPOINT_SECONDS = 0.0\n"
        "from ppcl_fx.passes.streaming.ledger import Ledger\n"
        "finish = Ledger.finish\n"
        "def slowly(self, cut):\n"
        "    finish(self, cut)\n"
        "    time.sleep(1e9 if cut == 3 else 0)\n"
        "Ledger.finish = slowly\n"
        "from ppcl_fx.cli.app import main\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, arguments)], stderr=subprocess.DEVNULL)
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
