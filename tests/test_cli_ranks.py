"""`ppcl-fx train` under torchrun and accelerate launch, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppcl_fx
from tests.train.pluggable import build

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_ranks_are_started_by_a_launcher(launcher: str, tmp_path: Path) -> None:
    """One result, printed once, and all students in the folder."""
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    model, calls = build()
    model.save(tmp_path / "student")
    calls.save(tmp_path / "calls")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "ppcl_fx", "train", tmp_path / "student"]
    command += ["--calls", tmp_path / "calls", "--stage", "depth", "--steps", "2", "--no-tensorboard", "--json"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ended = subprocess.run(
        [str(part) for part in command],
        env={**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["stages"][0]["steps"] == 2
    assert len(said["stages"][0]["last"]) == 2
    index = json.loads(next((tmp_path / "student" / "checkpoints").glob("*/pieces.json")).read_text())
    assert index["ranks"] == 2
    trained = dict(ppcl_fx.load(tmp_path / "student").students_module.named_parameters())
    before = dict(model.students_module.named_parameters())
    moved = {name.split(".")[1] for name, p in trained.items() if not p.equal(before[name])}
    depth = {name.split(".")[1] for name in before if name.startswith("students.")}
    assert moved == depth, "both ranks' students came home"
    assert len(depth) == 2
