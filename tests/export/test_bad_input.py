"""What cannot be exported, built or run: one line, exit code 2, and nothing half-written under a final name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl_fx import EngineTransformer
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, check_artefacts, export
from ppcl_fx.export.onnx import writer as onnx_file
from ppcl_fx.export.runtime.model_spec import ModelSpec
from ppcl_fx.export.store.publish import MARK, claimed
from ppcl_fx.export.tensorrt import folder as build_folder
from ppcl_fx.export.verify.integrity import sample_of
from ppcl_fx.io.files import write_json, write_safetensors
from ppcl_fx.model.student_folder import StudentFolder
from tests.cli_place import Place
from tests.export.fake_trt import working
from tests.export.killed import command, save_student
from tests.export.test_killed import check_whole, contents
from tests.models import qwen_kwargs

pytestmark = pytest.mark.slow

KEEPS = (1.0, 0.75)
FULL = 50_000
"""Bytes that a file may have where there is no room: fewer than a graph, a copy of weights, or a file with weights."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``student``, and with ``out``, which it was exported to."""
    folder = tmp_path_factory.mktemp("made")
    opened = StudentFolder.open(save_student(folder / "student"))
    export(opened, folder / "out", ExportConfig(keep=KEEPS, memory_limit=1))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Place:
    """A copy, and the program."""
    shutil.copytree(made, tmp_path / "made")
    return Place(tmp_path / "made", capfd)


def trained(file: Path) -> None:
    """Every value is another one; the size stays."""
    write_safetensors(file, {name: tensor * 1.01 for name, tensor in load_file(file).items()}, digests=True)


def damage(out: Path, how: str) -> None:
    weights, graph = out / "weights" / "students.safetensors", out / "keep-0.75.onnx"
    if how == "moved":
        weights.rename(out / "elsewhere.safetensors")
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size - 8)
    elif how == "trained":
        trained(weights)
    elif how == "linked":
        weights.rename(out / "a.safetensors")
        weights.symlink_to(out / "a.safetensors")
    elif how == "graph":
        proto = onnx.load(str(graph), load_external_data=False)
        proto.producer_name = "other"
        graph.write_bytes(proto.SerializeToString())
    elif how == "outside":
        proto = onnx.load(str(graph), load_external_data=False)
        next(t for t in proto.graph.initializer if t.external_data).external_data[0].value = "../secret"
        graph.write_bytes(proto.SerializeToString())
    elif how == "beyond":
        proto = onnx.load(str(graph), load_external_data=False)
        entries = next(t for t in proto.graph.initializer if t.external_data).external_data
        next(entry for entry in entries if entry.key == "offset").value = str(10**9)
        graph.write_bytes(proto.SerializeToString())


DAMAGE = {
    "moved": "no such file",
    "cut": "bytes, and .* were written",
    "trained": "its content is not what was written",
    "linked": "is a link",
    "graph": "bytes, and .* were written|its content is not what was written",
    "outside": "leaves its folder",
    "beyond": "beyond the end of",
}


@pytest.mark.parametrize(("how", "words"), DAMAGE.items())
def test_damaged_artefacts_are_seen_wherever_they_are_used(
    place: Place, how: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place.folder / "out"
    damage(out, how)

    def run() -> None:
        with torch.no_grad():
            EngineTransformer(out, keep=0.75, device="cpu")(**qwen_kwargs())

    for use in (lambda: check_artefacts(out), lambda: check_artefacts(out, hashes=False), run):
        with pytest.raises(PpclError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(build_folder, "load_builder", lambda left, kind: working())
    before = contents(out)
    line = place.refused("build", out, "--tokens", "16-64", "--batch", "1-4", "--text", "1-16")
    assert "keep-0.75" in line or "students.safetensors" in line or "secret" in line
    assert contents(out) == before


def test_one_changed_byte_is_found_by_the_hash(place: Place) -> None:
    out = place.folder / "out"
    weights = out / "weights" / "students.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2 + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PpclError, match=r"its content is not what was written \(sha256\), and keep-0.75.onnx"):
        check_artefacts(out)
    # The graph that has none of these weights is whole.
    assert check_artefacts(out / "keep-1.onnx")[0].keep == 1.0


def test_the_sample_sees_training_of_any_tensor(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made / "student" / "students.safetensors")
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    seen = {sample_of(file)}
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.01 + 0.01}, file)
        seen.add(sample_of(file))
    assert len(seen) == len(tensors) + 1
    data = tmp_path / "x.onnx.data"
    found = set()
    for value in (0, 1):
        data.write_bytes(bytes([value]) * 100_000)
        found.add(sample_of(data))
    assert len(found) == 2


def test_graphs_beside_a_student_that_was_trained_again(place: Place) -> None:
    """Its weights are used where they are, so they are others now."""
    student = place.folder / "student"
    place.ok(*command(student, student))
    trained(student / "students.safetensors")
    with pytest.raises(PpclError, match="trained again since") as caught, torch.no_grad():
        EngineTransformer(student, keep=0.75, backend="torch", device="cpu")(**qwen_kwargs())
    assert "\n" not in str(caught.value)
    assert "already exists" in place.refused(*command(student, student))
    place.ok(*command(student, student, "--overwrite"))
    check_artefacts(student)


def test_a_head_of_another_model_is_refused(place: Place) -> None:
    out = place.folder / "out"
    head = json.loads((out / "head.json").read_text())
    head["plan"]["model"] = "another"
    (out / "head.json").write_text(json.dumps(head))
    with pytest.raises(PpclError, match=r"head.json: was changed after it was written"):
        EngineTransformer(out, device="cpu")
    write_json(out / "head.json", ModelSpec.model_validate({**head, "seal": ""}))
    with pytest.raises(PpclError, match=r"head.json: of another model or plan than keep-1.onnx; export .* --keep 1 -o"):
        EngineTransformer(out, device="cpu")


def test_a_truncated_student_is_not_exported(place: Place) -> None:
    student, out = place.folder / "student", place.folder / "new"
    file = student / "teacher" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert "truncated" in place.refused(*command(student, out))
    assert not out.exists()


def test_a_profile_that_the_model_cannot_serve(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place.folder / "new"
    spec = ["--format", "trtexec", "--tokens", "16-64", "--batch", "1-4", "--text", "1-5000"]
    line = place.refused(*command(place.folder / "student", out, *spec, keep="0.75"))
    assert "encoder_hidden_states_1 = 5000 is asked for, and the model does not take it" in line
    assert sorted(path.name for path in out.glob("*.onnx")) == ["keep-0.75.onnx"]
    check_artefacts(out)
    monkeypatch.setattr(build_folder, "load_builder", lambda left, kind: working())
    assert "no range for the batch" in place.refused("build", out, "--tokens", "16-64")
    assert not list(out.glob("*.engine*")) and not (out / "build.json").exists()


# ---- no room ---------------------------------------------------------------------------------------------------


@contextmanager
def full(size: int = FULL) -> Iterator[None]:
    """Files that grow beyond a size cannot be written, whoever writes them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("what", "out", "more"),
    [
        ("keep-1.onnx", "student", ()),
        ("diffusion_pytorch_model.safetensors", "new", ()),
        ("float32.safetensors", "new", ("--dtype", "bf16")),
        ("keep-1.onnx", "new", ("--embed",)),
        ("keep-1.onnx", "data", ("--embed",)),
    ],
)
def test_no_room_leaves_nothing(
    place: Place, what: str, out: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if out == "data":
        monkeypatch.setattr(onnx_file, "LARGE", 1000)
    before = contents(place.folder)
    with full():
        line = place.refused(*command(place.folder / "student", place.folder / out, *more))
    assert what.replace("float32", "bfloat16") in line and "cannot be written (" in line
    assert "partial" not in line
    assert contents(place.folder) == before
    assert out == "student" or not (place.folder / out).exists()


def test_no_room_for_new_weights_keeps_the_old_artefacts(place: Place) -> None:
    trained(place.folder / "student" / "students.safetensors")
    out = place.folder / "out"
    before = contents(out)
    for more in ((), ("--embed",)):
        with full():
            place.refused(*command(place.folder / "student", out, "--overwrite", *more))
        assert contents(out) == before


def test_no_room_for_the_second_graph_keeps_the_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new folder, and where the graphs of a student before its training are replaced."""
    save, count = onnx_ir.save, 0

    def second(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count % 2 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    student, old = place.folder / "student", contents(place.folder / "out")
    trained(student / "students.safetensors")
    for out, more in ((place.folder / "new", ()), (place.folder / "out", ("--overwrite",))):
        run = [arg if arg != "1.0,0.75" else "0.75,1.0" for arg in command(student, out, *more)]
        with monkeypatch.context() as patch:
            patch.setattr(onnx_ir, "save", second)
            line = place.refused(*run)
        assert f"{out / 'keep-1.onnx'}: cannot be written (No space left on device); make room" in line
        assert check_whole(out) == ({"keep-0.75", "keep-1"} if more else {"keep-0.75"})
        found = contents(out)
        assert not [name for name in found if "partial" in name]
        assert found.get("keep-1.onnx") == (old["keep-1.onnx"] if more else None)
        place.ok(*run)  # the same command, once there is room
        assert check_whole(out) == {"keep-0.75", "keep-1"}
        files = {name for name in contents(out) if name.startswith("weights/students")}
        assert len(files) == 1 and MARK not in contents(out)


# ---- who else is there -----------------------------------------------------------------------------------------


def test_two_exports_do_not_write_to_one_folder(place: Place) -> None:
    out = place.folder / "out"
    before = contents(out)
    with claimed(out, [out / "keep-0.5.onnx"]):
        line = place.refused(*command(place.folder / "student", out, "--overwrite"))
    assert "another export is writing there" in line
    assert contents(out) == before


def test_only_what_a_killed_export_left_is_removed(place: Place) -> None:
    out = place.folder / "out"
    ours = [".keep-0.75.partial-0a1b2c3d.onnx", ".keep-0.5.partial-0a1b2c3d.json", "weights/.a.partial-0a1b2c3d"]
    others = [".mine", ".keep-0.75.engine.partial-0a1b2c3d", ".other.partial-0a1b2c3d.onnx"]
    for name in (*ours, *others):
        (out / name).write_text("x")
    with claimed(out, [out / "keep-1.onnx"]):
        assert not [name for name in ours if (out / name).exists()]
    line = place.refused(*command(place.folder / "student", out))
    assert "keep-1.onnx: already exists" in line
    assert all((out / name).exists() for name in others)


def test_a_folder_that_is_no_store_of_weights_is_left_alone(place: Place) -> None:
    """A user's student may be called ``weights``: no copy goes there, and none of its files is replaced."""
    new = place.folder / "new"
    shutil.copytree(place.folder / "student", new / "weights")
    before = contents(new)
    line = place.refused(*command(place.folder / "student", new))
    assert "holds other files than weights of exports; choose another folder" in line
    assert contents(new) == before
