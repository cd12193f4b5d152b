"""Nothing is replaced or removed but what this package wrote: each kind of folder as it is written, and others."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.owned_folders import Kind, check_replaceable, foreign
from tests.cli_place import Place

pytestmark = pytest.mark.slow


@pytest.fixture
def place(written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Place:
    """The folders, copied."""
    shutil.copytree(written, tmp_path / "copy")
    return Place(tmp_path / "copy", capfd)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewriting(place: Place, out: Path, *more: object) -> tuple[object, ...]:
    given = ("rewrite", place.model, "--plan", place.plan, "--calls", place.calls, "-o", out, "--overwrite")
    return (*given, *more)


def test_what_the_commands_write_is_known(written: Path) -> None:
    """A file that is written and not declared would make the next --overwrite refuse."""
    known: dict[str, Kind] = {
        "run/calls": owned.CALLS,
        "student": owned.STUDENT,
        "student/finetuned": owned.FINETUNED,
        "student/checkpoints": owned.CHECKPOINTS,
        "engines": owned.ENGINES,
        "stock": owned.PRUNED_RATIOS,
    }
    assert {name: foreign(written / name, kind) for name, kind in known.items()} == dict.fromkeys(known)
    assert foreign(written / "student", owned.SAVED) == "holds checkpoints, which ppcl-fx did not write there"


def test_a_student_is_replaced_with_what_training_wrote(place: Place) -> None:
    place.ok(*rewriting(place, place.student))
    assert not (place.student / "checkpoints").exists() and foreign(place.student, owned.SAVED) is None


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("model", "model is read and lies there"),
        ("model/transformer", "no ppcl.json there says that ppcl-fx wrote a saved pluggable model"),
        ("run", "calls is read and lies there"),
        ("run/calls", "calls is read and lies there"),
        (".", "model is read and lies there"),
        ("MODEL-LINK", "a link to .*, so it is not replaced"),
        ("student/../run", "calls is read and lies there"),
        ("student/teacher", "no ppcl.json there says"),
        ("pictures", "no ppcl.json there says"),
    ],
)
def test_rewrite_replaces_no_other_folder(place: Place, out: str, why: str) -> None:
    (place.folder / "pictures").mkdir()
    (place.folder / "pictures" / "holiday.jpg").write_bytes(b"mine")
    (place.folder / "MODEL-LINK").symlink_to(place.model)
    before = tree(place.folder)
    line = place.refused(*rewriting(place, place.folder / out))
    assert re.search(why, line), line
    assert tree(place.folder) == before


@pytest.mark.parametrize(
    "name", ["holiday.jpg", "teacher/notes.txt", "finetuned/model.ckpt", "pictures", "plan.json.bak"]
)
def test_a_student_with_anything_else_in_it_is_not_replaced(place: Place, name: str) -> None:
    path = place.student / name
    if path.suffix:
        path.write_bytes(b"mine")
    else:
        path.mkdir()
    line = place.refused(*rewriting(place, place.student))
    assert f"holds {name}, which ppcl-fx did not write there" in line
    assert path.exists() and (place.student / "finetuned" / "finetuned.json").is_file()


def test_a_student_whose_plan_or_teacher_is_read_is_not_replaced(place: Place) -> None:
    student, before = place.student, tree(place.student)
    teacher = ("rewrite", student / "teacher", "--plan", place.plan, "--calls", place.calls)
    assert "teacher is read and lies there" in place.refused(*teacher, "-o", student, "--overwrite")
    plan = ("rewrite", place.model, "--plan", student / "plan.json", "--calls", place.calls)
    assert "plan.json is read and lies there" in place.refused(*plan, "-o", student, "--overwrite")
    os.link(student / "plan.json", place.folder / "same.json")
    plan = ("rewrite", place.model, "--plan", place.folder / "same.json", "--calls", place.calls)
    assert "same.json is read and lies there" in place.refused(*plan, "-o", student, "--overwrite")
    (place.folder / "teacher").symlink_to(student / "teacher")
    linked = ("rewrite", place.folder / "teacher", "--plan", place.plan, "--calls", place.calls)
    assert "teacher is read and lies there" in place.refused(*linked, "-o", student, "--overwrite")
    assert tree(student) == before


def test_streamed_students_are_replaced_although_the_teachers_files_are_the_same_ones(place: Place) -> None:
    out = place.folder / "streamed"
    for _ in range(2):
        place.ok(*rewriting(place, out, "--memory-limit", "4GiB"))
    weights = "diffusion_pytorch_model.safetensors"
    assert (out / "teacher" / weights).samefile(place.model / "transformer" / weights)


def test_analyze_replaces_calls_and_results_of_its_own_alone(place: Place) -> None:
    again = ("analyze", place.model, "-o", place.run, "--prompts", place.folder / "prompts.txt", "--steps", 1)
    (place.run / "unfinished").mkdir()
    (place.run / "unfinished" / "novel.txt").write_text("mine")
    assert "unfinished: holds novel.txt" in place.refused(*again, "--overwrite")
    shutil.rmtree(place.run / "unfinished")
    (place.calls / "notes.txt").write_text("mine")
    assert "calls: holds notes.txt" in place.refused(*again, "--overwrite")
    (place.calls / "notes.txt").unlink()
    (place.run / "report.html").write_text("<html>mine</html>")
    assert "report.html: ppcl-fx did not write it" in place.refused(*again, "--overwrite")
    (place.run / "report.html").unlink()
    (place.run / "analysis.json").write_text('{"mine": 1}')
    assert "analysis.json: ppcl-fx did not write it" in place.refused(*again, "--overwrite")
    (place.run / "analysis.json").unlink()
    elsewhere = place.folder / "elsewhere"
    place.calls.rename(elsewhere)
    place.calls.symlink_to(elsewhere)
    assert "calls: a link to" in place.refused(*again, "--overwrite")
    assert foreign(elsewhere, owned.CALLS) is None
    place.calls.unlink()
    place.ok(*again)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("checkpoints", "checkpoints: a link to"),
        ("finetuned", "finetuned: a link to"),
        ("logs/log.jsonl", "log.jsonl: a link to"),
        ("train.toml", "train.toml: a link to"),
        ("losses.json", "losses.json: a link to"),
        ("report.html", "report.html: a link to"),
    ],
)
def test_training_replaces_nothing_behind_a_link(place: Place, name: str, why: str) -> None:
    there, elsewhere = place.student / name, place.folder / "elsewhere"
    there.rename(elsewhere)
    there.symlink_to(elsewhere)
    before = tree(place.folder)
    assert why in place.refused("train", place.student, "--calls", place.calls, "--steps", "1,1,1")
    assert tree(place.folder) == before


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("finetuned/holiday.jpg", "mine", "finetuned: holds holiday.jpg"),
        ("logs/log.jsonl", "my log\n", "log.jsonl: no training wrote it"),
        ("logs/log.jsonl", '{"a": 1}\n', "log.jsonl: no training wrote it"),
        ("train.toml", "lr = 1e-3\n", "train.toml: ppcl-fx did not write it"),
        ("losses.json", "[1]", "losses.json: ppcl-fx did not write it"),
        ("report.html", "mine", "report.html: ppcl-fx did not write it"),
        ("checkpoints/01-00000001/holiday.jpg", "mine", "holds holiday.jpg"),
    ],
)
def test_training_replaces_nothing_of_others(place: Place, name: str, content: str, why: str) -> None:
    path = place.student / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    students = (place.student / "students.safetensors").read_bytes()
    assert why in place.refused("train", place.student, "--calls", place.calls, "--steps", "1,1,1")
    assert path.read_text() == content and (place.student / "students.safetensors").read_bytes() == students


def test_export_replaces_graphs_and_folders_of_its_own_alone(place: Place) -> None:
    stock, graph = place.folder / "stock", place.folder / "engines" / "keep-1.onnx"
    again = ("export", place.student, "--keep", "1.0", "--format", "diffusers", "--overwrite", "-o")
    for out in (place.student, place.model, place.folder):
        before = tree(out)
        place.refused(*again, out)
        assert tree(out) == before
    (stock / "keep-0.7" / "holiday.jpg").write_bytes(b"mine")
    assert "holds keep-0.7/holiday.jpg" in place.refused(*again, stock)
    (stock / "keep-0.7" / "holiday.jpg").unlink()
    place.ok(*again, stock)
    assert [path.name for path in stock.iterdir()] == ["keep-1"]
    graph.write_bytes(b"mine")
    onnx = ("export", place.student, "--keep", "1.0", "--overwrite", "-o", place.folder / "engines")
    assert "keep-1.onnx: ppcl-fx did not write it" in place.refused(*onnx)
    assert graph.read_bytes() == b"mine"


def test_save_pretrained_keeps_what_a_training_wrote(place: Place) -> None:
    import ppcl_fx

    model = ppcl_fx.load(place.student)
    before = tree(place.student)
    with pytest.raises(PpclError, match="holds checkpoints, which"):
        model.save_pretrained(place.student)
    assert tree(place.student) == before
    model.save_pretrained(place.folder / "new")
    model.save_pretrained(place.folder / "new")
    assert foreign(place.folder / "new", owned.SAVED) is None


def test_what_is_no_manifest_tells_no_kind(tmp_path: Path) -> None:
    kind = Kind("a thing", (r"a\.json",), manifest="a.json", keys=("x",), says={"kind": "thing"})
    (tmp_path / "b").mkdir()
    real = tmp_path / "real.json"
    real.write_text('{"kind": "thing", "x": 1}')
    for content in ("", "[]", "{", '{"kind": "thing"}', '{"kind": "other", "x": 1}', "[" * 100_000):
        (tmp_path / "b" / "a.json").write_text(content)
        with pytest.raises(PpclError, match="no a.json there says"):
            check_replaceable(tmp_path / "b", kind)
    (tmp_path / "b" / "a.json").unlink()
    (tmp_path / "b" / "a.json").symlink_to(real)
    with pytest.raises(PpclError, match="no a.json there says"):
        check_replaceable(tmp_path / "b", kind)
    (tmp_path / "b" / "a.json").unlink()
    real.rename(tmp_path / "b" / "a.json")
    check_replaceable(tmp_path / "b", kind)
    (tmp_path / "b" / ".x.partial-0123abcd").mkdir()  # a kill left it
    check_replaceable(tmp_path / "b", kind)
