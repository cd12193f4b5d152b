"""NVIDIA's compiled Python bindings as they are, looked at without TensorRT and without a GPU.

Those of TensorRT for RTX come with their library.

The bindings (`tensorrt-cu13-bindings`) are compiled code that needs TensorRT's libraries to load. Empty stand-ins for
those libraries are enough to look at the real classes, enumerations and signatures. That proves that every name and
keyword used exists; it does not prove that an engine builds.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SYMBOLS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]
IMPORT = {
    "tensorrt": "import tensorrt_bindings as trt",
    "rtx": "import tensorrt_rtx_libs, tensorrt_rtx_bindings as trt",
}
LOOK = """
import json, sys
IMPORT
found = {}
for path in json.load(sys.stdin):
    thing = trt
    for part in path.split("."):
        thing = getattr(thing, part, None)
    maker = getattr(thing, "__init__", None) if isinstance(thing, type) else thing
    found[path] = None if thing is None else {
        "doc": getattr(maker, "__doc__", "") or "", "type": type(thing).__name__, "text": str(thing)}
print(json.dumps(found))
"""
METHODS = ("value", "has", "make", "call", "get", "set", "implement")


@dataclass(frozen=True)
class Use:
    """One use of TensorRT in the source: how, what, with which keywords, and where."""

    how: str
    path: str
    keywords: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return f"{self.how} {self.path}({', '.join(self.keywords)})"


def uses_in(text: str, file: str) -> list[Use]:
    """Collect every use of an `Api` in a source text; a name that is not a plain string is an error."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            continue
        owner = node.func.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if name.lstrip("_") != "api":
            continue
        where = f"{file}:{node.lineno}"
        first = node.args[0] if node.args else None
        assert isinstance(first, ast.Constant) and isinstance(first.value, str), f"{where}: no plain name"
        assert all(keyword.arg for keyword in node.keywords), f"{where}: keywords are not spelt out"
        keywords = tuple(str(keyword.arg) for keyword in node.keywords)
        found.append(Use(node.func.attr, first.value, keywords, where))
    return found


def all_uses() -> list[Use]:
    """Every use in the package's source."""
    files = [p for room in ("ppcl_fx", "export", "passes", "train") for p in sorted((ROOT / room).rglob("*.py"))]
    seen: dict[Path, None] = dict.fromkeys(path.resolve() for path in files)
    return [use for path in seen for use in uses_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


@lru_cache
def environment() -> dict[str, str]:
    """The environment in which the bindings load; skips the test where they cannot."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if importlib.util.find_spec("tensorrt_bindings") is None or sys.platform != "linux" or compiler is None:
        # The bindings load only with stand-ins for NVIDIA's libraries, which are compiled here.
        pytest.skip("needs Linux, a C compiler, and the package tensorrt-cu13-bindings")
    folder = Path(tempfile.mkdtemp(prefix="ppcl-fx-trt-"))
    source, empty = folder / "stub.c", folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS), encoding="utf-8")
    empty.write_text("typedef int nothing;\n", encoding="utf-8")
    for library, text in (("nvinfer", source), ("nvonnxparser", empty), ("nvinfer_plugin", empty)):
        target = folder / f"lib{library}.so.11"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(text)], check=True)
        shutil.copy(target, target.with_suffix(".10"))  # for the bindings of TensorRT 10
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def in_bindings(program: str, given: str = "") -> str:
    """Run a program where ``import tensorrt_bindings`` works, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program], input=given, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_known: dict[str, dict[str, Any]] = {"tensorrt": {}, "rtx": {}}


def look(names: Iterable[str], kind: str = "tensorrt") -> dict[str, Any]:
    """What a library's bindings hold under each name: None, or documentation, type and text."""
    known = _known[kind]
    new = [name for name in dict.fromkeys(names) if name not in known]
    if new:
        known.update(json.loads(in_bindings(LOOK.replace("IMPORT", IMPORT[kind]), json.dumps(new))))
    return known


@dataclass(frozen=True)
class Signature:
    """One overload: its parameters with their types, those that must be given, and what comes back."""

    types: dict[str, str]
    required: frozenset[str]
    returns: str


def signatures(path: str, kind: str = "tensorrt") -> list[Signature]:
    """The overloads of a method, or of a class's constructor."""
    lines = look([path], kind)[path]["doc"].splitlines()
    return [_signature(line) for line in lines if re.search(r"\((self|arg0)\b", line) and ") ->" in line]


def _signature(line: str) -> Signature:
    inside, returns = line[line.index("(") + 1 : line.rindex(") ->")], line[line.rindex(") ->") + 4 :]
    parts, depth, current = [], 0, ""
    for letter in inside:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    named = [part.strip() for part in [*parts, current] if part.strip()]
    types = {part.partition(":")[0]: part.partition(":")[2].partition("=")[0].strip() for part in named}
    types.pop("self", None)
    required = {part.partition(":")[0] for part in named if "=" not in part} - {"self"}
    return Signature(types, frozenset(required), returns.strip())


def fitting(path: str, keywords: Iterable[str], kind: str = "tensorrt") -> Signature | None:
    """The overload that takes exactly these keywords, with all that must be given among them."""
    given = set(keywords)
    return next((s for s in signatures(path, kind) if s.required <= given <= set(s.types)), None)
