"""SIGKILL while a student is exported: whole files only, old ones or new ones, and the same bytes in the end."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ppcl_fx.export import check_artefacts
from ppcl_fx.export.artefacts import external_data
from ppcl_fx.export.claim import MARK
from ppcl_fx.export.names import manifest_path
from tests.export.killed import command, save_student, work

PATIENCE = 600.0
KILLS = 3


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.export.killed_soon"])
    return found


def begin(context: ForkServerContext, arguments: list[str], at: int | None = None) -> tuple[BaseProcess, Connection]:
    """Start the program, and return once it runs."""
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(arguments, at, tell))
    process.start()
    assert hear.poll(PATIENCE)
    assert hear.recv() == "ready"
    return process, hear


def finish(context: ForkServerContext, arguments: list[str]) -> int:
    """Run the program to its end; return how often it gave a file a name or took one away."""
    process, hear = begin(context, arguments)
    process.join(PATIENCE)
    assert process.exitcode == 0
    found: int = hear.recv()
    return found


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
    process, _ = begin(context, command(student, straight))
    began = time.monotonic()
    process.join(PATIENCE)
    span = time.monotonic() - began
    assert process.exitcode == 0
    moments, kills = random.Random(5), 0
    for _ in range(KILLS):
        process, _ = begin(context, command(student, killed))
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
    context: ForkServerContext, tmp_path: Path
) -> None:
    """Killed before each second change of a name, from the first weight file to the last leftover."""
    old, new = save_student(tmp_path / "old"), save_student(tmp_path / "new", scale=1.01)
    before, straight = tmp_path / "before", tmp_path / "straight"
    finish(context, command(old, before))
    shutil.copytree(before, straight)
    changes = finish(context, command(new, straight, "--overwrite", keep="0.75"))
    wanted, former = contents(straight), contents(before)
    (students,) = (name for name in wanted if name.startswith("weights/students"))
    assert students not in former and "weights/students.safetensors" in former  # and what the old graph used is gone
    changed = {name for name in wanted if wanted[name] != former.get(name)}
    assert changed == {"keep-0.75.onnx", "keep-0.75.json", students}
    seen = []
    for at in range(0, changes, 2):
        out = tmp_path / f"killed-{at}"
        shutil.copytree(before, out)
        process, _ = begin(context, command(new, out, "--overwrite", keep="0.75"), at)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        done = check_whole(out)
        assert "keep-1" in done
        found = contents(out)
        is_new = found["keep-0.75.onnx"] == wanted["keep-0.75.onnx"]
        assert is_new or found["keep-0.75.onnx"] == former["keep-0.75.onnx"]
        seen.append(("new" if is_new else "old") if "keep-0.75" in done else "none")
        if at in (changes // 4 * 2, changes - 2):
            finish(context, command(new, out, "--overwrite", keep="0.75"))
            assert contents(out) == wanted
    assert set(seen) == {"old", "none", "new"}
    assert seen == sorted(seen, key=["old", "none", "new"].index)
