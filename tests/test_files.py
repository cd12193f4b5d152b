"""Files: whole or absent, one line for every bad one, and no name that leaves its folder."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import (
    Sealed,
    inside,
    new_folder,
    read_json,
    read_safetensors,
    tensor_shapes,
    write_json,
    write_safetensors,
    write_text,
)
from ppcl_fx.io.owned_folders import Kind


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    first: int
    score: float = 0.0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    parts: list[Inner]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_json_round_trip_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "outer.json"
    value = Outer(name="ä", parts=[Inner(first=1, score=0.1), Inner(first=2)])
    write_json(path, Outer(name="old", parts=[]))
    write_json(path, value)
    assert read_json(path, Outer) == value
    assert names(path.parent) == ["outer.json"]


def test_json_with_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", Outer(name="x", parts=[Inner(first=1, score=float("nan"))]))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "a", "parts": [{"first": "x"}]}', r"parts\.0\.first: input should be a valid integer"),
        ('{"name": "a", "parts": [{"frist": 1, "first": 1}]}', r"parts\.0\.frist: .*did you mean 'first'"),
        ('{"name": "a"}', r"parts: field required"),
        ('{"name": "a", "parts": [{"first": 1, "score": NaN}]}', "not valid JSON"),
        ('{"name": "a", "pa', "not valid JSON"),
        ("[]", "the whole file: "),
    ],
)
def test_bad_json_is_one_line_naming_file_and_field(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "outer.json"
    path.write_text(text)
    with pytest.raises(PpclError, match=reason) as caught:
        read_json(path, Outer)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_json_names_the_near_match(tmp_path: Path) -> None:
    write_text(tmp_path / "analysis.json", "{}")
    with pytest.raises(PpclError, match="no such file.*did you mean 'analysis.json'"):
        read_json(tmp_path / "analisys.json", Outer)


def test_json_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "outer.json").write_bytes(b'{"name": "\xff\xfe", "parts": []}')
    with pytest.raises(PpclError, match="not valid JSON"):
        read_json(tmp_path / "outer.json", Outer)


def test_safetensors_round_trip_with_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {"t": base.t(), "row": base[1], "same": base, "bf16": base.bfloat16(), "none": base[:0]}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"made-by": "test"})
    back = read_safetensors(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert tensor_shapes(tmp_path / "a.safetensors")["bf16"] == ("BF16", (3, 4))
    assert names(tmp_path) == ["a.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PpclError, match=r"a\.safetensors: truncated") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(PpclError, match="not a safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(PpclError, match="cannot be written"):
            write_safetensors(path, {"x": torch.ones(10_000)})
        with pytest.raises(PpclError, match="cannot be written"):
            write_text(tmp_path / "b.txt", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_safetensors(path)["x"], torch.ones(3))
    assert names(tmp_path) == ["a.safetensors"]


def test_unwritable_places(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    for write in (
        lambda: write_text(tmp_path / "file" / "x.json", "x"),
        lambda: write_safetensors(tmp_path / "file" / "x.safetensors", {}),
        lambda: write_text(tmp_path, "x"),
        lambda: new_folder(tmp_path / "file" / "run").__enter__(),
    ):
        with pytest.raises(PpclError, match="cannot be written.*choose a writable place"):
            write()
    assert names(tmp_path) == ["file"]


TEXTS = Kind("texts", (r".+\.txt",))


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "run" / "calls"
    with new_folder(final) as folder:
        write_text(folder / "sub" / "a.txt", "a")
        assert not final.exists()
    assert (final / "sub" / "a.txt").read_text() == "a"
    assert names(final.parent) == ["calls"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_leaves_nothing_on_error(tmp_path: Path, error: type[BaseException]) -> None:
    def work(overwrite: bool) -> None:
        with new_folder(tmp_path / "run", replaces=TEXTS if overwrite else None) as folder:
            write_text(folder / "a.txt", "new")
            raise error

    with pytest.raises(error):
        work(overwrite=False)
    assert names(tmp_path) == []
    write_text(tmp_path / "run" / "a.txt", "old")
    with pytest.raises(error):
        work(overwrite=True)
    assert names(tmp_path) == ["run"] and (tmp_path / "run" / "a.txt").read_text() == "old"


def test_new_folder_replaces_only_when_told(tmp_path: Path) -> None:
    final = tmp_path / "run"
    final.mkdir()
    with new_folder(final) as folder:
        write_text(folder / "old.txt", "old")
    with pytest.raises(PpclError, match="already exists"), new_folder(final):
        raise AssertionError("no work before the check")
    with new_folder(final, replaces=TEXTS) as folder:
        write_text(folder / "new.txt", "new")
    assert names(final) == ["new.txt"] and names(tmp_path) == ["run"]
    (final / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(PpclError, match="holds mine.jpg"), new_folder(final, replaces=TEXTS):
        raise AssertionError("no work before the check")
    (final / "mine.jpg").unlink()
    with pytest.raises(PpclError, match="holds mine.jpg"), new_folder(final, replaces=TEXTS) as folder:
        (final / "mine.jpg").write_bytes(b"mine")  # while the work was under way
    assert (final / "mine.jpg").read_bytes() == b"mine" and names(tmp_path) == ["run"]


def test_new_folder_does_not_replace_where_we_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "here" / "a.txt", "a")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PpclError, match="not replaced"), new_folder("..", replaces=TEXTS):
        raise AssertionError("no work before the check")
    write_text(tmp_path / "file", "x")
    with pytest.raises(PpclError, match="is a file"), new_folder(tmp_path / "file", replaces=TEXTS):
        raise AssertionError("no work before the check")


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "out/x"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(tmp_path, folder / "out")
    with pytest.raises(PpclError, match="leaves its folder|symbolic link"):
        inside(folder, name)


def test_names_that_stay_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "sub/a.json") == tmp_path / "sub" / "a.json"


def test_importing_files_does_not_import_torch() -> None:
    code = "import sys; import ppcl_fx.io.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Note(Sealed):
    text: str
    number: float = 0.5


def test_a_sealed_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    note = Note(text="a", number=0.1)
    write_json(path, note)
    assert read_json(path, Note) == note and note.seal == ""
    written = json.loads(path.read_text())
    assert len(written["seal"]) == 64
    for changed in ({"text": "b"}, {"number": 0.2}, {"seal": "0" * 64}):
        path.write_text(json.dumps(written | changed))
        with pytest.raises(PpclError, match="note.json: was changed after it was written"):
            read_json(path, Note)
    path.write_text(json.dumps({"text": "of an older version"}))
    assert read_json(path, Note).text == "of an older version"


def test_messages_and_names_of_any_length(tmp_path: Path) -> None:
    assert str(PpclError("x" * 1000)) == "x" * 1000
    line = str(PpclError("a" * 5000 + "end"))
    assert len(line) <= 1000 and line.startswith("aaa") and line.endswith("aend")
    for name in ("x" * 300, "é" * 200, "\ud800"):
        with pytest.raises(PpclError):
            inside(tmp_path, name)


class _Before(Sealed):
    value: float


class _Later(_Before):
    added: int = 3


def test_a_sealed_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    """The seal is of what stands in the file, not of what a later version adds to it."""
    write_json(tmp_path / "x.json", _Before(value=0.1))
    assert read_json(tmp_path / "x.json", _Later) == _Later(value=0.1)
    text = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(text.replace("0.1", "0.2"))
    with pytest.raises(PpclError, match="was changed after it was written"):
        read_json(tmp_path / "x.json", _Later)
