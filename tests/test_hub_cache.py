"""A cache of the hub is made of links from snapshots to blobs: all opens from there, and no other link is followed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.export import check_artefacts
from ppcl_fx.io.files import inside
from ppcl_fx.io.shards import Shards
from ppcl_fx.lora.keys import read_lora
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.student_folder import FinetunedFolder, load_finetuned
from ppcl_fx.train.core import checkpoints
from tests.cli_place import Place
from tests.lora import loras

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_cache(folder: Path, root: Path) -> Path:
    """Lay a folder out as `huggingface_hub.snapshot_download` does, and return its snapshot."""
    snapshot, blobs = root / "models--me--it" / "snapshots" / "a1b2", root / "models--me--it" / "blobs"
    blobs.mkdir(parents=True)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = len(link.relative_to(blobs.parent).parts) - 1
        link.symlink_to(Path(*[".."] * up, "blobs", blob.name))
    return snapshot


def answer(model: Any, written: Path) -> torch.Tensor:
    call = {**ppcl_fx.Calls.open(written / "run" / "calls").examples(), "return_dict": False}
    with torch.no_grad():
        found = model(**call)[0]
    assert isinstance(found, torch.Tensor)
    return found


def test_a_student_opens_from_a_snapshot(written: Path, tmp_path: Path) -> None:
    snapshot = as_cache(written / "student", tmp_path)
    here, there = ppcl_fx.load(written / "student"), ppcl_fx.load(snapshot)
    assert isinstance(there, ppcl_fx.PluggableModel) and there.effects == here.effects is not None  # type: ignore[union-attr]
    assert torch.equal(answer(here, written), answer(there, written))
    tuned = load_finetuned(there, snapshot / "finetuned")
    assert FinetunedFolder.open(snapshot / "finetuned").students == list(there.edits)
    assert next(tuned.parameters()).is_floating_point()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_engines_run_from_a_snapshot(written: Path, tmp_path: Path, backend: str) -> None:
    snapshot = as_cache(written / "engines", tmp_path)
    assert (snapshot / "weights" / "teacher" / WEIGHTS).is_symlink()
    here = ppcl_fx.EngineTransformer(written / "engines", backend=backend)
    there = ppcl_fx.EngineTransformer(snapshot, backend=backend)
    assert torch.equal(answer(here, written), answer(there, written))
    assert len(check_artefacts(snapshot)) == 1


def test_teachers_calls_and_released_checkpoints_open_from_a_snapshot(written: Path, tmp_path: Path) -> None:
    pipeline = open_source(str(as_cache(written / "model", tmp_path / "a"))).pipeline()
    original = open_source(str(written / "model")).pipeline()
    assert torch.equal(answer(pipeline.transformer, written), answer(original.transformer, written))
    calls = ppcl_fx.Calls.open(as_cache(written / "run" / "calls", tmp_path / "b"))
    assert calls.fingerprint == ppcl_fx.Calls.open(written / "run" / "calls").fingerprint
    released = DATA / "released_layout_tiny"
    here, there = ppcl_fx.load(released), ppcl_fx.load(as_cache(released, tmp_path / "c"))
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))


def test_a_snapshot_is_exported_and_rewritten_elsewhere(
    written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place, snapshot = Place(tmp_path, capfd), as_cache(written / "student", tmp_path / "a")
    place.ok("export", snapshot, "--keep", "1.0", "-o", tmp_path / "engines", "--runs", "1")
    assert not any(path.is_symlink() for path in (tmp_path / "engines").rglob("*"))
    assert len(check_artefacts(tmp_path / "engines")) == 1
    model = as_cache(written / "model", tmp_path / "b")
    for more in ([], ["--memory-limit", "4GiB"]):
        out = tmp_path / f"student{len(more)}"
        given = ["--plan", written / "plan.json", "--calls", written / "run" / "calls", *more]
        place.ok("rewrite", model, "-o", out, *given)
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert isinstance(ppcl_fx.load(out), ppcl_fx.PluggableModel)


def test_a_lora_opens_from_a_snapshot(tmp_path: Path, tiny_flux: Any) -> None:
    teacher, _ = tiny_flux
    folder = loras.save(teacher, tmp_path / "lora")
    snapshot = as_cache(folder, tmp_path)
    here, there = read_lora(folder), read_lora(snapshot)
    assert here.tensors.keys() == there.tensors.keys() and here.modules
    assert all(torch.equal(there.tensors[name], tensor) for name, tensor in here.tensors.items())
    file = next(snapshot.glob("*.safetensors"))
    assert read_lora(file).modules == here.modules  # as hf_hub_download names it
    shutil.move(next(folder.glob("*.safetensors")), tmp_path / "elsewhere.safetensors")
    (folder / file.name).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(PpclError, match="a symbolic link out of"):
        read_lora(folder)


def pipeline(folder: Path) -> object:
    return open_source(str(folder)).pipeline()


def engines(folder: Path) -> object:
    return ppcl_fx.EngineTransformer(folder)(**ppcl_fx.Calls.open(folder.parent / "run" / "calls").examples())


READERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "student": (
        ppcl_fx.load,
        (
            "ppcl.json",
            "plan.json",
            "students.safetensors",
            "effects.json",
            "teacher",
            "teacher/config.json",
            f"teacher/{WEIGHTS}",
        ),
    ),
    "student/finetuned": (FinetunedFolder.open, ("finetuned.json", "model.safetensors")),
    "student/checkpoints/01-00000002": (checkpoints.read, ("state.json", "state.safetensors", "SHA256SUMS")),
    "run/calls": (ppcl_fx.Calls.open, ("index.json", "calls-00000.safetensors")),
    "model": (
        pipeline,
        (
            "model_index.json",
            "transformer",
            "transformer/config.json",
            f"transformer/{WEIGHTS}",
            "scheduler/scheduler_config.json",
            "text_encoder",
        ),
    ),
    "model/transformer": (Shards.open, (WEIGHTS,)),
    "engines": (
        engines,
        ("keep-1.json", "keep-1.onnx", "head.json", f"weights/teacher/{WEIGHTS}", "weights"),
    ),
    "released": (ppcl_fx.load, ("config.json", WEIGHTS)),
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, (_, files) in READERS.items() for file in files])
def test_a_link_to_anywhere_else_is_refused(written: Path, tmp_path: Path, name: str, file: str) -> None:
    shutil.copytree(written, tmp_path / "copy")
    shutil.copytree(DATA / "released_layout_tiny", tmp_path / "copy" / "released")
    folder, elsewhere = tmp_path / "copy" / name, tmp_path / "elsewhere"
    shutil.move(folder / file, elsewhere)
    (folder / file).symlink_to(elsewhere)
    with pytest.raises(PpclError, match=r"a symbolic link out of .*; put the file itself there") as error:
        READERS[name][0](folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("link", "target", "fine"),
    [
        ("models--a--b/snapshots/r/x", "models--a--b/blobs/1", True),
        ("models--a--b/snapshots/r/sub/x", "models--a--b/blobs/1", True),
        ("snapshots/models--a--b/snapshots/r/x", "snapshots/models--a--b/blobs/1", True),
        ("models--a--b/snapshots/r/x", "models--a--b/blobs/deep/1", False),
        ("models--a--b/snapshots/r/x", "models--a--b/refs/1", False),
        ("models--a--b/snapshots/r/x", "models--a--b/snapshots/other/1", False),
        ("models--a--b/snapshots/r/x", "models--c--d/blobs/1", False),
        ("models--a--b/other/r/x", "models--a--b/blobs/1", False),
        ("mine/snapshots/r/x", "mine/blobs/1", False),
    ],
)
def test_only_the_blobs_of_the_same_repository_are_followed(
    tmp_path: Path, link: str, target: str, fine: bool
) -> None:
    for path in (link, target):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("x")
    (tmp_path / link).symlink_to(tmp_path / target)
    path = tmp_path / link
    if fine:
        assert inside(path.parent, "x").read_text() == "x"
        return
    with pytest.raises(PpclError, match="a symbolic link out of"):
        inside(path.parent, "x")


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(PpclError, match="a: cannot be followed .*; put the file itself there"):
        inside(tmp_path, "a")
