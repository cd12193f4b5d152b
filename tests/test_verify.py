"""Weights that are no weights, files of another model, and `ppcl-fx verify`, which reads every byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.cli.integrity import verify
from ppcl_fx.errors import PpclError
from ppcl_fx.formats.released import save_released
from ppcl_fx.formats.stock import save_stock
from ppcl_fx.io.files import write_safetensors
from ppcl_fx.io.shards import DIGESTS, Shards, is_finite
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder, load_finetuned, save_finetuned
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests import models
from tests.cli_place import Place
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a fine-tuned model in it, calls, a stock and a released folder, and a pipeline."""
    folder = tmp_path_factory.mktemp("whole") / "all"
    model, kwargs = models.tiny_qwen(blocks=4)
    given = {name: value for name, value in kwargs.items() if value is not None}
    calls = Calls([Call(given, ("a",), 0.5, 0, 2)])
    calls.save(folder / "calls")
    pluggable = rewrite(trace(model, kwargs), Plan(edits=[DepthEdit(stack=STACK, first=1, last=2)]))
    pluggable.save(folder / "student")
    save_finetuned(mixture(pluggable, pluggable.edits), pluggable, pluggable.edits, folder / "student" / "finetuned")
    pluggable.plug(students=pluggable.edits)
    save_stock(pluggable, folder / "stock")
    save_released(pluggable, folder / "released")
    save_pipeline(folder / "pipeline", blocks=2)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "all")


def refused(run: Callable[[], Any], *words: str) -> None:
    with pytest.raises(PpclError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def flip(path: Path, name: str) -> None:
    """Change the lowest bit of one value in the middle of a tensor, where no sample looks."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + first + (last - first) // 8 * 4 + 4] ^= 1
    path.write_bytes(data)


READERS: dict[str, tuple[str, str, Callable[[Path], list[Callable[[], Any]]]]] = {
    "teacher": (
        f"pipeline/transformer/{WEIGHTS}",
        "transformer_blocks.1.attn.to_q.weight",
        lambda f: [open_source(str(f / "pipeline")).transformer, open_source(str(f / "pipeline")).pipeline],
    ),
    "text encoder": (
        f"pipeline/text_encoder/{WEIGHTS}",
        "table",
        lambda f: [open_source(str(f / "pipeline")).pipeline],
    ),
    "student's teacher": (
        f"student/teacher/{WEIGHTS}",
        "transformer_blocks.1.attn.to_q.weight",
        lambda f: [lambda: ppcl_fx.load(f / "student")],
    ),
    "student": (
        "student/students.safetensors",
        "students.transformer_blocks_1_2.attn.to_q.weight",
        lambda f: [lambda: ppcl_fx.load(f / "student"), lambda: _read_all(f / "student")],
    ),
    "fine-tuned": (
        "student/finetuned/model.safetensors",
        "students.transformer_blocks_1_2.attn.to_q.weight",
        lambda f: [lambda: load_finetuned(ppcl_fx.load(f / "student"), f / "student" / "finetuned")],  # type: ignore[arg-type]
    ),
    "released": (
        f"released/{WEIGHTS}",
        "transformer_blocks.1.attn.to_q.weight",
        lambda f: [lambda: ppcl_fx.load(f / "released")],
    ),
}  # fmt: skip


def _read_all(folder: Path) -> None:
    opened = StudentFolder.open(folder)
    for name in opened.students.stored:
        opened.read(name)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, kind: str, value: float) -> None:
    file, name, readers = READERS[kind]
    flat = load_file(folder / file)[name].numel()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[flat // 2 + 1] = value

    rewritten(folder / file, spoil)
    for read in (*readers(folder), lambda: verify(folder / file.split("/")[0])):
        refused(read, name, "holds NaN or infinity")


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "text encoder"])
def test_whole_numbers_are_no_weights(folder: Path, kind: str) -> None:
    file, name, readers = READERS[kind]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].mul(100).to(torch.int32)

    rewritten(folder / file, spoil)
    more = {
        "student": lambda: StudentFolder.open(folder / "student"),
        "fine-tuned": lambda: FinetunedFolder.open(folder / "student" / "finetuned"),
    }
    for read in (*readers(folder), more.get(kind, readers(folder)[0])):
        refused(read, name, "is stored as int32, which cannot hold this weight")


def test_a_teacher_that_was_exchanged(folder: Path) -> None:
    student = folder / "student"
    one, other = (f"transformer_blocks.{n}.attn.to_q.weight" for n in (0, 3))

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    whole = (student / "teacher" / WEIGHTS).read_bytes()
    rewritten(student / "teacher" / WEIGHTS, exchange)
    for read in (ppcl_fx.load, StudentFolder.open):
        refused(lambda read=read: read(student), str(student / "teacher"), "not the model that plan.json was made for")  # type: ignore[misc]
    (student / "teacher" / WEIGHTS).write_bytes(whole)
    ppcl_fx.load(student)
    config = student / "teacher" / "config.json"  # heads exchanged with their size: every shape is as it was
    config.write_text(config.read_text().replace('"axes_dims_rope": [\n  4,\n  6', '"axes_dims_rope": [\n  6,\n  4'))
    assert json.loads(config.read_text())["axes_dims_rope"] == [6, 4, 6]
    for read in (ppcl_fx.load, StudentFolder.open):
        refused(lambda read=read: read(student), "not the model that plan.json was made for")  # type: ignore[misc]


def test_a_plan_of_another_model(folder: Path) -> None:
    plan = folder / "student" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "model": "0" * 64}))
    for read in (ppcl_fx.load, StudentFolder.open, verify):
        refused(lambda read=read: read(folder / "student"), "its fingerprint is 000000000000")  # type: ignore[misc]


def test_what_is_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64):
        tensor = torch.ones(5).to(dtype)
        assert is_finite(tensor) and is_finite(tensor[:0])
        for value in (float("nan"), float("inf"), float("-inf")):
            spoilt = torch.ones(5)
            spoilt[3] = value
            assert not is_finite(spoilt.to(dtype))
    assert is_finite(torch.tensor([2**62])) and is_finite(torch.tensor([True]))


def test_everything_is_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Place(whole, capsys).ok("verify", whole)
    assert found["folder"] == str(whole)
    checked = {Path(one["path"]).relative_to(whole).as_posix(): one for one in found["checked"]}
    assert set(checked) == {
        "calls", "student", "student/teacher", "student/students.safetensors", "student/finetuned", "stock", "released",
        "pipeline/transformer", "pipeline/text_encoder", "pipeline/scheduler",
    }  # fmt: skip
    digested = {path for path, one in checked.items() if one["compared"].endswith("all finite, sha256 of each")}
    assert digested == {"student/teacher", "student/students.safetensors", "student/finetuned", "stock", "released"}
    tensors = len(load_file(whole / "pipeline" / "transformer" / WEIGHTS))
    words = f"{tensors} tensors, all finite; no digest stored for {tensors} of them"
    assert checked["pipeline/transformer"]["compared"] == words


@pytest.mark.parametrize(
    "file", [f"student/teacher/{WEIGHTS}", "student/students.safetensors", "student/finetuned/model.safetensors",
             f"stock/{WEIGHTS}", f"released/{WEIGHTS}", "calls/calls-00000.safetensors"]
)  # fmt: skip
def test_one_changed_bit_is_found(folder: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = max(load_file(folder / file).items(), key=lambda item: item[1].numel())[0]
    flip(folder / file, name)
    line = Place(folder, capsys).refused("verify", folder)
    assert str(folder / file) in line and "not what was" in line
    assert name in line or file.startswith("calls")


def test_exchanged_names_are_found(folder: Path) -> None:
    path = folder / "stock" / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    one, other = (f"transformer_blocks.{n}.attn.to_q.weight" for n in (0, 1))
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(lambda: verify(folder / "stock"), one, "is not what was written")


def test_other_faults(folder: Path, tmp_path: Path) -> None:
    refused(lambda: verify(tmp_path / "gone"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: verify(tmp_path / "empty"), "holds nothing that ppcl-fx or diffusers wrote")
    (folder / "calls" / "calls-00000.safetensors").unlink()
    refused(lambda: verify(folder), "calls-00000.safetensors", "no such file")
    path = folder / "student" / "students.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {DIGESTS: "{"})
    refused(lambda: verify(folder / "student"), str(path), "its stored digests are damaged")
    save_file(tensors, path, {DIGESTS: json.dumps({"gone": "0" * 64})})
    refused(lambda: verify(folder / "student"), "the digests name gone")
    save_file(tensors, path)
    assert "no digest stored" in next(one.compared for one in verify(folder / "student") if one.path == path)


def test_files_are_the_same_bytes_each_time_and_safetensors_reads_them(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"b": shared, "a": shared.T, "n": torch.tensor(3), "e": torch.ones(0)}
    tensors["h"] = torch.ones(2, dtype=torch.bfloat16)
    for number in range(3):
        write_safetensors(tmp_path / f"{number}", tensors, {"format": "pt", "z": "1"}, digests=True)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(3)}) == 1
    found = load_file(tmp_path / "0")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    digests = Shards.one_file(tmp_path / "0").digests()
    assert digests.keys() == tensors.keys()
    assert digests == {name: ppcl_fx.io.fingerprint.tensor_digest(tensor) for name, tensor in tensors.items()}  # type: ignore[attr-defined]
