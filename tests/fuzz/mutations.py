"""One change of a file: of a value in it, of its bytes, or of what the file is."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 100_000, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-308, 1e308, "", "a", "0", "-1",
    "../x", "/etc/passwd", "a\0b", "\u202e\x1b[31m", "é" * 300, [], {}, [0], [[]], ["a"], {"a": 1}, [None], [1, 2, 3],
    list(range(500)), [2**40], "float32", "nan",
]  # fmt: skip
"""What a value of a document is replaced by."""
JUNK = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"[" * 100_000,
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"\r\n",
]
"""What is put into bytes."""

Change = Callable[[random.Random, Path], str]
"""Changes a file in place and says how."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a document, the document itself first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for key in path:
        document = document[key]
    return document


def changed(rng: random.Random, document: Any) -> tuple[Any, str]:
    """Return a document with one value changed, and how."""
    document = copy.deepcopy(document)
    *front, last = rng.choice([path for path in places(document) if path])
    parent = at(document, tuple(front))
    where, old = ".".join(map(str, (*front, last))), parent[last]
    kind = rng.choice(["value", "value", "near", "drop", "rename", "twice", "exchange", "type"])
    if kind == "near" and type(old) in (int, float):
        parent[last] = rng.choice([old + 1, old - 1, -old, old * 1000, old * 2, float(old), old / 2])
    elif kind == "near" and isinstance(old, str) and old:
        spot = rng.randrange(len(old))
        parent[last] = old[:spot] + rng.choice("a0.-/ ") + old[spot + 1 :]
    elif kind == "drop":
        del parent[last]
        return document, f"{where} dropped"
    elif kind == "rename" and isinstance(parent, dict):
        name = rng.choice([last[:-1], last + "s", last.upper(), rng.choice(list(parent))])
        parent[name] = parent.pop(last)
        return document, f"{where} called {name!r}"
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(old))
        return document, f"{where} twice"
    elif kind == "exchange":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], parent[last]
        return document, f"{where} and {other} exchanged"
    elif kind == "type":
        parent[last] = rng.choice([str(old), [old], {"value": old}])
    else:
        parent[last] = rng.choice(VALUES)
    return document, f"{where} is {parent[last]!r}"[:200]


def json_value(rng: random.Random, path: Path) -> str:
    """Change one value of a JSON file."""
    document, how = changed(rng, json.loads(path.read_bytes()))
    path.write_text(json.dumps(document), encoding="utf-8")
    return how


def lines_value(rng: random.Random, path: Path) -> str:
    """Change one value of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    document, how = changed(rng, json.loads(lines[number]))
    lines[number] = json.dumps(document)
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"line {number}: {how}"


def toml_value(rng: random.Random, path: Path) -> str:
    """Change one line of a TOML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.choice([n for n, line in enumerate(lines) if "=" in line])
    name = lines[number].partition("=")[0]
    value = rng.choice([*VALUES, "inf", "nan", "1979-05-27", "{a = 1}", "[[x]]"])
    text = value if isinstance(value, str) and rng.random() < 0.5 else json.dumps(value)
    lines[number] = rng.choice([f"{name}= {text}", f"{name.strip()}s = {text}", lines[number] + "\n" + lines[number]])
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    return lines[number][:200]


def header_value(rng: random.Random, path: Path) -> str:
    """Change one value of a safetensors header, or its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15:
        new = rng.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63 - 1])
        path.write_bytes(new.to_bytes(8, "little") + data[8:])
        return f"a header of {new} bytes"
    document = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        entries = [name for name in document if name != "__metadata__"]
        one, other = rng.choice(entries), rng.choice(entries)
        document[one], document[other] = document[other], document[one]
        how = f"{one} and {other} exchanged"
    else:
        document, how = changed(rng, document)
    text = json.dumps(document).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return how


def body_value(rng: random.Random, path: Path) -> str:
    """Change a byte of a tensor, or make a value NaN or infinite."""
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    place = begin + 4 * rng.randrange(max(1, (len(data) - begin) // 4))
    kind = rng.choice(["bit", "bit", "nan", "infinity"])
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    else:
        data[place : place + 4] = {"nan": b"\0\0\xc0\x7f", "infinity": b"\0\0\x80\x7f"}[kind]
    path.write_bytes(data)
    return f"{kind} at {place}"


def some_bytes(rng: random.Random, path: Path) -> str:
    """Cut the file, or flip, remove, insert or repeat bytes."""
    data = path.read_bytes()
    spot = rng.randrange(len(data)) if data else 0
    kind = rng.choice(["cut", "flip", "insert", "remove", "repeat", "append", "all"])
    junk = rng.choice(JUNK)
    if kind == "cut":
        data = data[:spot]
    elif kind == "flip":
        data = data[:spot] + bytes([data[spot] ^ (1 << rng.randrange(8))]) + data[spot + 1 :]
    elif kind == "insert":
        data = data[:spot] + junk + data[spot:]
    elif kind == "remove":
        data = data[:spot] + data[spot + rng.randrange(1, 64) :]
    elif kind == "repeat":
        data = data[:spot] + data[spot : spot + 64] + data[spot:]
    elif kind == "append":
        data += junk
    else:
        data = junk
    path.write_bytes(data)
    return f"{kind} at {spot} {junk[:8]!r}"


def no_file(rng: random.Random, path: Path) -> str:
    """Put something that is no such file in its place."""
    kind = rng.choice(["gone", "folder", "pipe", "socket", "endless", "link out", "loop", "sparse", "closed"])
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may not be long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "link out":
        path.symlink_to("/etc/hostname")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "closed":
        path.write_bytes(data)
        path.chmod(0)
    return kind


JSON = (json_value, json_value, json_value, some_bytes, no_file)
LINES = (lines_value, lines_value, some_bytes, no_file)
TOML = (toml_value, toml_value, some_bytes, no_file)
SAFETENSORS = (header_value, body_value, body_value, some_bytes, no_file)
BYTES = (some_bytes, some_bytes, some_bytes, no_file)
