"""SIGKILL while a student is exported: whole files only, old ones or new ones, and the same bytes in the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.cli.app import main
from ppcl_fx.export import check_artefacts
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.export.store.publish import MARK
from ppcl_fx.export.verify.integrity import external_data
from tests.export.killed import command, save_student, work

pytestmark = pytest.mark.kill

PATIENCE = 600.0
KILLS = 3


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.export.killed_soon"])
    return found


def begin(context: ForkServerContext, arguments: list[str]) -> BaseProcess:
    """Start the program, and return once it runs."""
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(arguments, tell))
    process.start()
    assert hear.poll(PATIENCE)
    assert hear.recv() == "ready"
    return process


def finish(context: ForkServerContext, arguments: list[str]) -> None:
    """Run the program to its end."""
    process = begin(context, arguments)
    process.join(PATIENCE)
    assert process.exitcode == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_whole(folder: Path) -> set[str]:
    """What has a final name is whole; return the graphs that have their manifests."""
    graphs = list(folder.glob("*.onnx"))
    named = [graph for graph in graphs if not graph.name.startswith(".")]
    done = [graph for graph in named if manifest_path(graph).is_file()]
    for graph in done:
        check_artefacts(graph)
    for graph in set(named) - set(done):
        for file, first, length in external_data(graph):
            assert first + length <= (graph.parent / file).stat().st_size
    assert {path.stem for path in folder.glob("keep-*.json")} == {graph.stem for graph in done}
    return {graph.stem for graph in done}


def test_an_export_killed_at_random_moments_ends_the_same_to_the_bit(
    context: ForkServerContext, tmp_path: Path
) -> None:
    student = save_student(tmp_path / "student")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = begin(context, command(student, straight))
    began = time.monotonic()
    process.join(PATIENCE)
    span = time.monotonic() - began
    assert process.exitcode == 0
    moments, kills = random.Random(5), 0
    for _ in range(KILLS):
        process = begin(context, command(student, killed))
        process.join(moments.uniform(0.2, 0.9) * span)
        if process.exitcode is not None:
            break  # this machine was quicker now than before
        process.kill()
        process.join(PATIENCE)
        kills += 1
        check_whole(killed)
    if process.exitcode != 0:
        finish(context, command(student, killed))  # the same command: what a killed one left may be replaced
    assert kills > 0
    assert contents(killed) == contents(straight)
    assert MARK not in contents(killed)


def test_a_graph_that_is_replaced_is_whole_wherever_the_export_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on the disk before each change of a name is what a kill at that moment leaves there."""
    old, new = save_student(tmp_path / "old"), save_student(tmp_path / "new", scale=1.01)
    before, out = tmp_path / "before", tmp_path / "out"
    assert main(command(old, before)) == 0
    shutil.copytree(before, out)
    left: list[Path] = []

    def kept(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            left.append(tmp_path / f"left-{len(left)}")
            shutil.copytree(out, left[-1])
            return change(*args, **kwargs)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kept(os.replace))
        patch.setattr(os, "unlink", kept(os.unlink))
        assert main(command(new, out, "--overwrite", keep="0.75")) == 0
    wanted, former = contents(out), contents(before)
    (students,) = (name for name in wanted if name.startswith("weights/students"))
    assert students not in former and "weights/students.safetensors" in former  # and what the old graph used is gone
    changed = {name for name in wanted if wanted[name] != former.get(name)}
    assert changed == {"keep-0.75.onnx", "keep-0.75.json", students}
    seen = []
    for folder in left:
        done, found = check_whole(folder), contents(folder)
        assert "keep-1" in done
        is_new = found["keep-0.75.onnx"] == wanted["keep-0.75.onnx"]
        assert is_new or found["keep-0.75.onnx"] == former["keep-0.75.onnx"]
        seen.append(("new" if is_new else "old") if "keep-0.75" in done else "none")
    assert set(seen) == {"old", "none", "new"}
    assert seen == sorted(seen, key=["old", "none", "new"].index)
    for state in ("none", "new"):
        folder = left[seen.index(state)]
        assert main(command(new, folder, "--overwrite", keep="0.75")) == 0
        assert contents(folder) == wanted
