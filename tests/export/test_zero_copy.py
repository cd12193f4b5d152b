"""Graphs over weights that stay where they are: the same without reading a weight, and equal to PyTorch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, Manifest, check_artefacts, export, lower
from ppcl_fx.export.store import weight_store as stores
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.export.verify.integrity import external_data
from ppcl_fx.export.verify.metrics import difference
from ppcl_fx.export.verify.onnx_runner import run, session
from ppcl_fx.io.files import read_json
from ppcl_fx.io.owned_folders import ENGINES, foreign
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan
from ppcl_fx.tracing import bind, trace
from tests import models

pytestmark = pytest.mark.slow

BLOCKS = "transformer_blocks"
MODELS: dict[str, tuple[Any, list[Edit]]] = {
    "qwen": (
        lambda: models.tiny_qwen(blocks=4),
        [DepthEdit(stack=BLOCKS, first=0, last=1), FfnEdit(stack=BLOCKS, block=2)],
    ),
    # Block 1 has two attentions: without its feed-forward, rows 0-2 and 6-8 of its modulation's nine stay.
    "sd3": (models.tiny_sd3, [DepthEdit(stack=BLOCKS, first=4, last=5), FfnEdit(stack=BLOCKS, block=1)]),
}


def saved(kind: str, folder: Path) -> Path:
    teacher, kwargs = MODELS[kind][0]()
    model = ppcl_fx.rewrite(trace(teacher, kwargs), Plan(edits=MODELS[kind][1]))
    torch.manual_seed(3)
    for name, parameter in model.students_module.named_parameters():
        if name.startswith("projectors."):
            nn.init.normal_(parameter, std=0.02)
    return model.save(folder)


def keeps(folder: Path) -> list[float]:
    """The teacher and the least; what lies between has no other blocks."""
    model = StudentFolder.open(folder).model
    return [1.0, round(model.param_count(model.edits) / model.teacher_params + 5e-4, 3)]


@pytest.fixture(scope="module", params=MODELS)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and its folder, with its graphs in it, made without reading a weight."""
    folder = saved(request.param, tmp_path_factory.mktemp(request.param) / "student")
    before = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    notes: list[str] = []
    opened = StudentFolder.open(folder)
    read: list[str] = []
    opened.read = lambda name: read.append(name) or torch.empty(0)  # type: ignore[method-assign, func-returns-value]
    export(opened, folder, ExportConfig(keep=tuple(keeps(folder)), memory_limit=1), note=notes.append)
    assert read == []
    assert len(notes) == 1 and "not checked against PyTorch: the weights were not read" in notes[0]
    new = {path.suffix for path in folder.rglob("*") if path.is_file() and path not in before}
    assert new == {".onnx", ".json"} and len(list(folder.glob("keep-*"))) == 2 * len(keeps(folder))
    return request.param, folder


def test_every_ratio_equals_pytorch_with_the_weights_where_they_are(student: tuple[str, Path]) -> None:
    kind, folder = student
    model = ppcl_fx.load(folder)
    assert isinstance(model, ppcl_fx.PluggableModel)
    example = MODELS[kind][0]()[1]
    cards = check_artefacts(folder)
    assert len({card.params for card in cards}) == 2
    for card in cards:
        onnx.checker.check_model(str(folder / card.file), full_check=True)
        gm = model.plug(students=card.students).graph_module()
        call = bind(gm, example)
        with torch.no_grad():
            expected = gm(**call)[0]
        assert difference(run(session(folder / card.file), lower(gm).feeds(call)), expected) < 1e-5
        assert card.parity == {} and card.parity_max_abs is None and card.unchecked is not None
        assert {weight.file for weight in card.weights} <= {
            "students.safetensors", "teacher/diffusion_pytorch_model.safetensors",
        }  # fmt: skip


def test_no_weight_has_a_copy_in_a_graph(student: tuple[str, Path]) -> None:
    _, folder = student
    for graph in folder.glob("*.onnx"):
        proto = onnx.load(str(graph), load_external_data=False)
        inside = [t for t in proto.graph.initializer if t.data_location != t.EXTERNAL]
        assert sum(len(t.SerializeToString()) for t in inside) < 2**14
        nodes = [t for n in proto.graph.node for a in n.attribute for t in (a.t, *a.tensors)]
        assert sum(len(t.SerializeToString()) for t in nodes) < 2**15
        assert len(external_data(graph)) > 50


def test_graph_is_the_same_with_the_weights_in_memory(student: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = student
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("keep-*"))
    made = export(StudentFolder.open(copy), copy, ExportConfig(keep=tuple(keeps(copy)), runs=1))
    for ratio in made.ratios:
        assert ratio.onnx.read_bytes() == (folder / ratio.onnx.name).read_bytes()
        assert ratio.parity_max_abs is not None and ratio.parity_max_abs < 1e-5
        assert len(ratio.parity) >= 4 and ratio.unchecked is None
    assert not (copy / "weights").exists()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Qwen-Image."""
    return saved("qwen", tmp_path_factory.mktemp("one") / "student")


def exported(folder: Path, out: Path, shares: list[float] | None = None, **options: Any) -> Any:
    notes: list[str] = []
    config = ExportConfig(**{"keep": shares or [1.0], "memory_limit": 1} | options)
    result = export(StudentFolder.open(folder), out, config, note=notes.append)
    return result, notes


def test_a_folder_above_the_student_copies_nothing(qwen: Path) -> None:
    made, _ = exported(qwen, qwen.parent)
    (card,) = check_artefacts(qwen.parent)
    assert [weight.file for weight in card.weights] == ["student/teacher/diffusion_pytorch_model.safetensors"]
    for path in (made.ratios[0].onnx, manifest_path(made.ratios[0].onnx)):
        path.unlink()
    assert not (qwen.parent / "weights").exists()


def test_another_folder_has_one_copy_for_all_ratios(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, notes = exported(qwen, out, keeps(qwen))
    copies = sorted(p.relative_to(out).as_posix() for p in (out / "weights").rglob("*") if p.is_file())
    assert copies == ["weights/students.safetensors", "weights/teacher/diffusion_pytorch_model.safetensors"]
    assert (out / copies[0]).read_bytes() == (qwen / "students.safetensors").read_bytes()
    assert "2 weight files" in notes[0] and "outside of this folder" in notes[0]
    inode = (out / copies[0]).stat().st_ino
    exported(qwen, out, [keeps(qwen)[1]], overwrite=True)  # the copy that is there is used again
    assert (out / copies[0]).stat().st_ino == inode
    assert len(check_artefacts(out)) == 2
    assert foreign(out, ENGINES) is None


def test_links_are_copied_and_it_says_so(qwen: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(qwen, copy)
    weights = copy / "teacher" / "diffusion_pytorch_model.safetensors"
    os.link(weights, tmp_path / "other.safetensors")
    _, notes = exported(copy, copy)
    assert "runtimes refuse links" in notes[0]
    (card,) = check_artefacts(copy)
    assert [weight.file for weight in card.weights] == ["weights/teacher/diffusion_pytorch_model.safetensors"]
    session(copy / card.file)


def test_other_dtype_is_converted_once(qwen: Path, tmp_path: Path) -> None:
    made, notes = exported(qwen, tmp_path, dtype=torch.bfloat16)
    (store,) = (tmp_path / "weights").iterdir()
    assert store.name == "bfloat16.safetensors" and "converted, once for all ratios" in notes[0]
    original, converted = load_file(qwen / "students.safetensors"), load_file(store)
    assert all(torch.equal(converted[name], tensor.bfloat16()) for name, tensor in original.items())
    assert {read_json(manifest_path(r.onnx), Manifest).dtype for r in made.ratios} == {"bfloat16"}
    graph = onnx.load(str(made.ratios[0].onnx), load_external_data=False).graph
    kinds = {t.data_type for t in graph.initializer if t.external_data}
    assert kinds == {onnx.TensorProto.BFLOAT16}


def test_embedded_files_need_nothing_else(qwen: Path, tmp_path: Path) -> None:
    made, _ = exported(qwen, tmp_path, keeps(qwen), embed=True)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] * 3 + [".onnx"] * 2
    model = ppcl_fx.load(qwen)
    assert isinstance(model, ppcl_fx.PluggableModel)
    ratio = made.ratios[1]
    gm = model.plug(students=ratio.students).graph_module()
    call = bind(gm, MODELS["qwen"][0]()[1])
    with torch.no_grad():
        assert difference(run(session(ratio.onnx), lower(gm).feeds(call)), gm(**call)[0]) < 1e-5
    assert external_data(ratio.onnx) == []
    check_artefacts(tmp_path)
    assert foreign(tmp_path, ENGINES) is None


@pytest.fixture(scope="module")
def whole(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one graph and its weights."""
    out = tmp_path_factory.mktemp("whole") / "out"
    exported(qwen, out)
    return out


@pytest.fixture
def artefact(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def damage(folder: Path, how: str) -> None:
    weights = folder / "weights" / "teacher" / "diffusion_pytorch_model.safetensors"
    if how == "moved":
        weights.rename(folder / "elsewhere.safetensors")
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size - 8)
    elif how == "changed":
        with weights.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x01\x02\x03\x04")
    elif how == "linked":
        os.link(weights, folder / "second")
    elif how == "graph":
        with (folder / "keep-1.onnx").open("ab") as file:
            file.write(b"\0")
    elif how == "outside":
        proto = onnx.load(str(folder / "keep-1.onnx"), load_external_data=False)
        next(t for t in proto.graph.initializer if t.external_data).external_data[0].value = "../secret"
        (folder / "keep-1.onnx").write_bytes(proto.SerializeToString())
    elif how == "manifest":
        (folder / "keep-1.json").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("moved", "no such file, and keep-1.onnx needs it: its weights moved"),
        ("cut", "bytes, and .* were written"),
        ("changed", "its content is not what was written"),
        ("linked", "is a link"),
        ("graph", "not an ONNX file|bytes, and .* were written"),
        ("outside", "leaves its folder"),
        ("manifest", "holds no exported graph"),
    ],
)
def test_damage_is_one_line(artefact: Path, how: str, words: str) -> None:
    check_artefacts(artefact)
    damage(artefact, how)
    with pytest.raises(PpclError, match=words) as caught:
        check_artefacts(artefact)
    assert "\n" not in str(caught.value)


def test_weights_that_other_graphs_use_are_not_replaced(artefact: Path, tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(seed=7, blocks=4)
    other = ppcl_fx.rewrite(trace(teacher, kwargs), Plan(edits=MODELS["qwen"][1]))
    folder = other.save(tmp_path / "other")
    with pytest.raises(PpclError, match=r"holds other weights, and keep-1\.json uses them"):
        exported(folder, artefact, [0.95])
    check_artefacts(artefact)
    exported(folder, artefact, [1.0], overwrite=True)  # the graph that used them is replaced too
    check_artefacts(artefact)


def test_no_room_is_told_before_anything_is_written(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("ppcl_fx.io.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(PpclError, match="make room"):
        exported(qwen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_half_way_leaves_nothing(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stores._clone

    def full(source: Path, target: Path) -> None:
        if source.name == "students.safetensors":
            real(source, target)
        else:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "_clone", full)
    with pytest.raises(PpclError, match="No space left on device"):
        exported(qwen, tmp_path / "out", keeps(qwen))
    assert not (tmp_path / "out").exists()


def test_truncated_header_is_refused(qwen: Path, tmp_path: Path) -> None:
    from ppcl_fx.io.shards import stored_tensors

    path = tmp_path / "x.safetensors"
    for data in (b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (90).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(PpclError, match="not a safetensors file"):
            stored_tensors(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(15))
    with pytest.raises(PpclError, match="truncated or not a safetensors file"):
        stored_tensors(path)
