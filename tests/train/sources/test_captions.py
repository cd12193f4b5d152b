"""Pictures and captions from untrusted files: what is read, what is skipped, what stops the run."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.train.images.captions import open_pairs


def write_metadata(folder: Path, *lines: object) -> Path:
    folder.mkdir(exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(text) + "\n")
    return folder


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, to
    return info


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(b"picture")
    lines = [{"file_name": "deep/a.png", "text": "a cat"}, {"file_name": "b.png", "caption": "a dog", "id": 3}]
    first, second = open_pairs(write_metadata(tmp_path, *lines))
    assert (first.name, first.caption, first.read()) == ("metadata.jsonl line 1 (deep/a.png)", "a cat", b"picture")
    assert (second.caption, second.problem) == ("a dog", None)
    with pytest.raises(OSError, match="no such file"):
        second.read()


def test_lines_that_say_nothing_are_corrupt_samples(tmp_path: Path) -> None:
    bad = ["{", "[" * 10**5, {"text": "x"}, {"file_name": "a.png"}, [1], "", '"x"', "null", {"file_name": None}]
    captions = [{"text": ""}, {"text": " \ufeff"}, {"text": None}, {"text": "a\0b"}, {"text": ["a"]}]
    bad += [{"file_name": "a.png", **caption} for caption in captions]
    good = {"file_name": "a.png", "text": "", "caption": "\ufeffa cat\r\n"}
    *found, last = open_pairs(write_metadata(tmp_path, *bad, good, '{"file_name": "a.png", "text": "x", "score": NaN}'))
    problems = [pair.problem for pair in found]
    no_name = "has no 'file_name'"
    no_caption = "has no caption under text, caption, prompt, prompt_en, caption_en, prompt_zh"
    empty = "its caption is empty"
    assert [str(problem).split(" (")[0] for problem in problems[:2]] == ["not valid JSON"] * 2
    assert problems[2:8] == [no_name, no_caption, *[no_name] * 4]
    assert problems[8:] == [empty, empty, no_caption, "its caption holds NUL", no_caption, None]
    assert (found[-1].caption, last.caption, last.problem) == ("a cat", "x", None)


LEAVING = ["../secret.png", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "\\\\a\\b\\x", "a\0b", ""]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_the_folder_stop_the_run(tmp_path: Path, name: str) -> None:
    folder = write_metadata(tmp_path / "data", {"file_name": name, "text": "x"})
    with pytest.raises(PpclError, match="leaves its folder; use a plain relative name") as caught:
        open_pairs(folder)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = write_metadata(tmp_path / "data", {"file_name": "a.png", "text": "x"})
    os.symlink(tmp_path / "secret.png", folder / "a.png")
    with pytest.raises(PpclError, match="a symbolic link out of"):
        open_pairs(folder)


def test_shards(tmp_path: Path) -> None:
    first = {"a/1.png": b"one", "a/1.txt": b" a cat \n"}
    first |= {"a/2.v.x": b"", "a/2.JPG": b"two", "a/2.json": b'{"text": "b"}'}
    write_tar(tmp_path / "s-0.tar", {"a": special(tarfile.DIRTYPE), **first})
    write_tar(tmp_path / "s-1.tar", {"1.webp": b"three", "1.txt": "Ä".encode()})
    pairs = open_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["s-0.tar:a/1", "s-0.tar:a/2", "s-1.tar:1"]
    assert [(pair.caption, pair.read()) for pair in pairs] == [("a cat", b"one"), ("b", b"two"), ("Ä", b"three")]
    assert [pair.name for pair in open_pairs(tmp_path / "s-1.tar")] == ["s-1.tar:1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s-0.tar", "s-1.tar"], "nothing is unpacked"


def test_samples_of_a_shard_that_are_not_whole_are_corrupt(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {
        "1.png": b"",
        "2.txt": b"no picture",
        "3.png": b"",
        "3.txt": b"\xff\xfe\xff",
        "4.png": b"",
        "4.json": b'{"text": 4}',
        "5.png": b"",
        "5.PNG": b"",
        "Thumbs.db": b"no sample",
        "6.png": b"",
        "6.caption": b"a cat",
    }
    problems = [pair.problem for pair in open_pairs(write_tar(tmp_path / "s.tar", members))]
    assert problems == [
        "has no caption (txt, caption, json)",
        "has no picture (jpg, jpeg, png, webp, gif, bmp, tif, tiff, jp2, avif)",
        "its caption (txt) cannot be read (it is UTF-16, not UTF-8)",
        "its json holds no caption under text, caption, prompt, prompt_en, caption_en, prompt_zh",
        "has two files of one kind",
        None,
    ]


@pytest.mark.parametrize(
    ("name", "member", "reason"),
    [
        ("/etc/1.png", b"x", "'/etc/1.png' leaves the archive"),
        ("../1.png", b"x", "'../1.png' leaves the archive"),
        ("..\\1.png", b"x", "leaves the archive"),
        ("C:\\1.png", b"x", "leaves the archive"),
        ("1.png", special(tarfile.SYMTYPE, "/etc/passwd"), "'1.png' is a link"),
        ("1.png", special(tarfile.LNKTYPE, "2.png"), "'1.png' is a link"),
        ("1.png", special(tarfile.FIFOTYPE), "'1.png' is no plain file"),
        ("1.png", special(tarfile.CHRTYPE), "'1.png' is no plain file"),
    ],
)
def test_members_that_are_no_plain_files_stop_the_run(
    tmp_path: Path, name: str, member: bytes | tarfile.TarInfo, reason: str
) -> None:
    write_tar(tmp_path / "s.tar", {"2.png": b"x", "2.txt": b"x", name: member})
    with pytest.raises(PpclError, match="write the shard again with plain files") as caught:
        open_pairs(tmp_path)
    assert reason in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_damaged_and_compressed_shards_are_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {"1.png": b"x" * 5000, "1.txt": b"x"}).read_bytes()
    write_tar(tmp_path / "s.tar", {"1.png": b"x"}, mode="w:gz")
    with pytest.raises(PpclError, match="not a whole uncompressed tar archive"):
        open_pairs(tmp_path)
    (tmp_path / "s.tar").write_bytes(whole[:3000])
    with pytest.raises(PpclError, match="not a whole uncompressed tar archive"):
        open_pairs(tmp_path)
    (tmp_path / "s.tar").rename(tmp_path / "s.tar.gz")
    with pytest.raises(PpclError, match=r"it holds s.tar.gz: compressed shards are not read, unpack it"):
        open_pairs(tmp_path)


def header(kind: bytes, size: int) -> bytes:
    """A member's header with a size that `tarfile` would not write."""
    info = tarfile.TarInfo("1.png")
    block = bytearray(info.tobuf())
    block[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else (2**95 + size).to_bytes(12, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [-1, -512, -(2**40), 2**31, 2**62])
def test_sizes_in_a_shard_that_cannot_be(tmp_path: Path, kind: bytes, size: int) -> None:
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(header(kind, size))
        file.truncate(2**33)
    with pytest.raises(PpclError, match="not a whole uncompressed tar archive|is no plain file|none of its 1 samples"):
        open_pairs(tmp_path)


def test_headers_about_headers_without_end_are_damage(tmp_path: Path) -> None:
    one = header(tarfile.GNUTYPE_LONGNAME, 1) + b"a".ljust(512, b"\0")
    (tmp_path / "s.tar").write_bytes(one * 3000 + b"\0" * 1024)
    with pytest.raises(PpclError, match="not a whole uncompressed tar archive"):
        open_pairs(tmp_path)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(PpclError, match="give a folder with metadata.jsonl"):
        open_pairs(tmp_path / "pictures")
    with pytest.raises(PpclError, match=r"no pictures with captions \(did you mean 'pictures'\?\)"):
        open_pairs(tmp_path / "picture")
    with pytest.raises(PpclError, match="no pictures with captions"):
        open_pairs(write_metadata(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.jpg": b"x", "b.jpg": b"x"}, r"none of its 2 samples can be used, the first is a.jpg: has no caption"),
        ({"train/a.jpg": b"x", "train/metadata.csv": b""}, "it holds train/metadata.csv: give the folder that"),
        ({"a.jpg": b"x", "metadata.parquet": b""}, "it holds metadata.parquet: tables of this kind are not read"),
        ({"data/0.parquet": b""}, "no pictures with captions; it holds data/0.parquet: tables"),
        ({"metadata.csv": b"file_name;text\na.jpg;b\n"}, r"names no column file_name \(file_name;text\)"),
        ({"metadata.csv": b""}, "names no column file_name"),
        ({"metadata.csv": b"file_name,label\na.jpg,b\n"}, "has no caption under text, caption"),
        ({"metadata.csv": b'file_name,text\na.jpg,"b\n'}, "line 2: unexpected end of data"),
        ({"metadata.csv": b"", "metadata.jsonl": b""}, "holds metadata.jsonl and metadata.csv; keep the one"),
        ({"metadata.jsonl": b'{"image": "a.jpg", "text": "b"}'}, "metadata.jsonl line 1: has no 'file_name'"),
        ({"metadata.jsonl": '{"file_name": "a"}'.encode("utf-16")}, "it is UTF-16, not UTF-8"),
    ],
)
def test_data_that_is_laid_out_otherwise_is_refused_by_its_layout(
    tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PpclError, match=reason) as caught:
        open_pairs(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_lie_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / ".b").mkdir()
    for name in ("a/b/s.tar", "s.tar", "a/.b/s.tar", "a/._s.tar"):
        write_tar(tmp_path / name, {"images\\1.jpg": b"x", "images\\1.txt": b"a cat"})
    pairs = open_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a/b/s.tar:images/1", "s.tar:images/1"]
    assert [(pair.caption, pair.read()) for pair in pairs] == [("a cat", b"x")] * 2


def json_of(**entry: Any) -> bytes:
    return json.dumps(entry).encode()


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"0.1.0.jpg": b"x", "0.json": json_of(prompt_zh="x", prompt_en="a cat")}, ("s.tar:0", "a cat", None)),
        ({"0.jpg": b"x", "0.json": json_of(prompt_en="a cat", caption_en="y")}, ("s.tar:0", "a cat", None)),
        ({"0.jpg": b"x", "0.json": json_of(text=None, caption="a cat")}, ("s.tar:0", "a cat", None)),
        ({"._0.jpg": b"m", "0.jpg": b"x", "._0.txt": b"m", "0.txt": b"a cat"}, ("s.tar:0", "a cat", None)),
        ({"__MACOSX/0.jpg": b"m", ".DS_Store": b"m", "0.jpg": b"x", "0.txt": b"a cat"}, ("s.tar:0", "a cat", None)),
        ({"0.mask.png": b"m", "0.jpg": b"x", "0.txt": b"\xef\xbb\xbfa cat\r\n"}, ("s.tar:0", "a cat", None)),
        (
            {"0.1.jpg": b"x", "0.2.jpg": b"y", "0.txt": b"a cat"},
            ("s.tar:0", "", "has several pictures (1.jpg, 2.jpg)"),
        ),
        ({"0.jpg": b"x", "0.txt": b" \r\n"}, ("s.tar:0", "", "its caption is empty")),
    ],
)
def test_shards_of_others(tmp_path: Path, members: dict[str, Any], found: tuple[str, str, str | None]) -> None:
    members["whole.jpg"], members["whole.txt"] = b"x", b"y"
    pair, _ = open_pairs(write_tar(tmp_path / "s.tar", members))
    assert (pair.name, pair.caption, pair.problem) == found
    if pair.problem is None:
        assert pair.read() == b"x"


def test_captions_beside_pictures(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files = {"a.PNG": b"x", "a.txt": b"a cat\r\n", "._a.PNG": b"m", ".DS_Store": b"m", "b.jpg": b"y",
        "c.txt": b"no picture", "e.1.jpg": b"x", "e.1.TXT": b"a bird", "f.tiff": b"x", "f.caption": b"a fish",
        "g.jpg": b"x", "g.txt": b"x" * (2**20 + 1), ".git": b""}
    (tmp_path / "h.jpg").mkdir()
    for name, content in {**files, "deep/d.webp": b"z", "deep/d.json": json_of(caption="a dog")}.items():
        (tmp_path / name).write_bytes(content)
    pairs = open_pairs(tmp_path)
    assert [(pair.name, pair.caption, pair.problem) for pair in pairs] == [
        ("a.PNG", "a cat", None),
        ("b.jpg", "", "has no caption (txt, caption, json)"),
        ("deep/d.webp", "a dog", None),
        ("e.1.jpg", "a bird", None),
        ("f.tiff", "a fish", None),
        ("g.jpg", "", pairs[-1].problem),
    ]
    assert "larger than the 1.0 MiB" in str(pairs[-1].problem)
    assert [pairs[0].read(), pairs[2].read()] == [b"x", b"z"]


def test_a_table_and_names_of_windows(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"x")
    table = b'\xef\xbb\xbffile_name,text\r\nimages\\0.jpg,"a cat, sitting"\r\n0.jpg,\r\n'
    (tmp_path / "metadata.csv").write_bytes(table)
    first, second = open_pairs(tmp_path)
    assert (first.caption, first.problem, first.read()) == ("a cat, sitting", None, b"x")
    assert second.problem == "its caption is empty"


def test_pipes_and_sparse_files_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("a cat")
    os.mkfifo(tmp_path / "a.jpg")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(2**40)
    for pair in open_pairs(tmp_path):
        with pytest.raises(OSError, match=r"is a pipe|larger than the 0.25 GiB"):
            pair.read()
    for name, opened in {"metadata.jsonl": tmp_path, "s.tar": tmp_path / "s.tar"}.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(PpclError, match=f"{name}: is a pipe"):
            open_pairs(opened)
