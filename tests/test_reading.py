"""What comes from outside: regular files of bounded size, UTF-8 text, bounded JSON; nothing waits."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ppcl_fx.cli.analyze import read_prompts
from ppcl_fx.errors import PpclError
from ppcl_fx.export.verify.integrity import external_data, sample_of
from ppcl_fx.io import reading
from ppcl_fx.io.files import read_json, read_safetensors, sha256_of, tensor_shapes
from ppcl_fx.io.reading import (
    append_regular,
    check_model_folder,
    open_regular,
    parse_json,
    read_bytes,
    read_text,
    text_of,
)
from ppcl_fx.io.shards import stored_tensors
from ppcl_fx.train import config


class Numbers(BaseModel):
    a: float = 0.0


READERS: list[Callable[[Path], Any]] = [
    open_regular,
    append_regular,
    lambda path: read_bytes(path, 100),
    read_text,
    lambda path: read_json(path, Numbers),
    read_safetensors,
    tensor_shapes,
    sha256_of,
    read_prompts,
    config.resolve,
    stored_tensors,
    sample_of,
    external_data,
]


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """A reader that waits fails its test."""

    def late(*_: object) -> None:
        raise TimeoutError("a reader waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused_at_once_by_what_it_is(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        places = {"pipe": "a pipe", "link": "a pipe", "folder": "a folder", "socket": "a socket"}
        for name, kind in {**places, "/dev/zero": "a device"}.items():
            with pytest.raises(PpclError, match=f"^{name}: is {kind}") as caught:
                read(Path(name))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [reader for i, reader in enumerate(READERS) if i != 1])
def test_a_missing_file_is_named_with_a_near_one(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    with pytest.raises(PpclError, match=r"plna.json: no such file \(did you mean 'plan.json'\?\)"):
        read(tmp_path / "plna.json")
    for name in ("a\0b", "a" * 300, "\ud800"):
        with pytest.raises(PpclError, match="cannot be opened"):
            read(tmp_path / name)


def test_files_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    for read in (lambda p: read_bytes(p, 10), read_text, lambda p: read_json(p, Numbers), read_prompts, config.resolve):
        with pytest.raises(PpclError, match="larger than the .* that such a file may have"):
            read(tmp_path / "sparse")
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "ten", 10) == b"0123456789"
    with pytest.raises(PpclError, match="larger than the 9"):
        read_bytes(tmp_path / "ten", 9)
    os.symlink("ten", tmp_path / "link")
    assert read_bytes(tmp_path / "link", 10) == b"0123456789"


def test_a_file_that_says_no_size_is_bounded_too() -> None:
    assert len(read_bytes("/proc/self/status", 2**20)) > 100
    with pytest.raises(PpclError, match="larger than"):
        read_bytes("/proc/self/status", 100)


def test_text_without_marks_and_with_one_kind_of_line_end() -> None:
    assert text_of("\ufeffa\r\n\ufeffb\rc \ufeff\n".encode()) == "a\nb\nc \ufeff\n"
    assert text_of("ä\u2028ö".encode()) == "ä\u2028ö"
    refused = {"ab".encode("utf-16"): "UTF-16, not", "ab".encode("utf-32"): "UTF-32", b"a\0": "NUL bytes"}
    for data, reason in {**refused, b"ab\xff": "byte 2 is 0xff: invalid start byte"}.items():
        with pytest.raises(ValueError, match=reason):
            text_of(data)


def test_json_is_bounded_in_depth_and_in_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"a": 1.5}\r\n')
    assert read_json(path, Numbers) == Numbers(a=1.5)
    assert parse_json(b'{"a": [1, "x", null, [0.5]]}') == {"a": [1, "x", None, [0.5]]}
    refused = {
        b"[" * 10**6: "recursion limit",
        b'{"a": ' * 10**5: "recursion limit",
        b'{"a": ' + b"9" * 10**6 + b"}": "out of range",
        b'{"a": 1e999}': "too large",
        b'{"a": [[-1e999]]}': "too large",
        b'{"a": NaN}': "",
        b'{"a": "\\ud800"}': "",
        b"\0" * 100: "",
        '{"a": 1}'.encode("utf-16"): "UTF-16",
    }
    for data, reason in refused.items():
        path.write_bytes(data)
        with pytest.raises(PpclError, match=f"a.json: not valid JSON.*{reason}") as caught:
            read_json(path, Numbers)
        assert len(str(caught.value)) < 500


def test_prompts_as_other_systems_write_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n \r\n\ufeffein größerer Kreis\u2028rot \r\n".encode())
    assert read_prompts(path) == ["a red circle", "ein größerer Kreis\u2028rot"]
    for data, reason in {b"": "holds no prompt", b"\xef\xbb\xbf\r\n": "holds no prompt", b"a\0b": "NUL"}.items():
        path.write_bytes(data)
        with pytest.raises(PpclError, match=reason):
            read_prompts(path)


def test_config_files_as_other_systems_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.toml"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    path.write_bytes("\ufeff# ä\r\nbatch = 3\r\nlog = '~/logs'\r\n".encode())
    options = config.resolve(path)
    assert (options.batch, options.log) == (3, str(tmp_path / "me" / "logs"))
    nested, digits, dotted = "[" * 4000, "9" * 4000, ".".join("a" * 4000)
    for text in (f"a = {nested}", f"batch = {digits}{digits}", f"{dotted} = 1", f"{dotted[:4000]}b = 1", "a\0 = 1"):
        path.write_text(text)
        with pytest.raises(PpclError) as caught:
            config.resolve(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_model_folder_is_looked_through_before_libraries_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "tokenizer" / "merges.txt").write_text("a" * 2000)
    os.symlink(tmp_path / "model_index.json", tmp_path / "tokenizer" / "vocab.json")
    check_model_folder(tmp_path)
    monkeypatch.setattr(reading, "TEXT_BYTES", 1999)
    with pytest.raises(PpclError, match=r"merges.txt: larger than"):
        check_model_folder(tmp_path)
    os.mkfifo(tmp_path / "tokenizer" / "a.json")
    with pytest.raises(PpclError, match=r"a.json: is a pipe"):
        check_model_folder(tmp_path)
