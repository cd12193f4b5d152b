"""The layers: an import never points up, at the top of a file, inside of a function or for a type checker alone."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("errors", "_version", "_names", "io"),
    ("ir", "tracing", "calls", "schema", "shapes"),
    ("passes",),
    ("model", "lora", "formats"),
    ("train", "export"),
    ("report", "cli", "demo", "demo_results", "__main__"),
)
"""Rooms and files of the package, lowest layer first: what stands in one may import itself and what stands below."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MOST = 12
"""Files of a room, without its ``__init__.py``."""


def modules() -> dict[str, Path]:
    """Return the package's modules by name."""
    found = {}
    for top in ("ppcl_fx", "passes", "train", "export"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "ppcl_fx" and parts[1] in ("passes", "train", "export"):
                continue  # the links to the other folders
            named = parts if top == "ppcl_fx" else ("ppcl_fx", *parts)
            found[".".join(named).removesuffix(".__init__")] = path
    return found


def imported(source: str, known: dict[str, Path]) -> Iterator[str]:
    """Give the package's modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "ppcl_fx":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "ppcl_fx")


def layer(module: str) -> int:
    """Return a module's layer; the package itself, which names its public objects, stands above all."""
    parts = module.split(".")
    return len(LAYERS) if len(parts) == 1 else LAYER[parts[1]]


def arrows(known: dict[str, Path]) -> set[tuple[str, str]]:
    """Return the imports that point up."""
    return {
        (module, other)
        for module, path in known.items()
        if layer(module) < len(LAYERS)
        for other in imported(path.read_text(encoding="utf-8"), known)
        if layer(other) > layer(module) and not (other == "ppcl_fx" and layer(module) == len(LAYERS) - 1)
    }


def test_no_import_points_up() -> None:
    assert sorted(arrows(modules())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ppcl_fx.cli.app import main",
        "import ppcl_fx.train.run",
        "def f():\n    from ppcl_fx.model import load",
        "if TYPE_CHECKING:\n    from ppcl_fx.export.store.names import stem",
        "from ppcl_fx import rewrite",
    ],
)
def test_an_arrow_that_points_up_is_found(source: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(source)
    assert len(arrows({**modules(), "ppcl_fx.passes.wrong": path})) == 1


def test_rooms_hold_a_dozen_files_at_most() -> None:
    rooms = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(room.relative_to(ROOT)): number for room, number in rooms.items() if number > MOST} == {}
