"""The documents name what is there: modules, objects, files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DOTTED = re.compile(r"\bppcl_fx(?:\.\w+)+")
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def resolves(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_name_of_the_package_in_a_page_is_there(page: Path) -> None:
    names = set(DOTTED.findall(page.read_text(encoding="utf-8")))
    assert sorted(name for name in names if not resolves(name)) == []


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert sorted(link for link in links if not (page.parent / link).exists()) == []


def test_the_rooms_and_files_of_the_architecture_are_there() -> None:
    rooms: list[Path] = []
    missing = []
    for line in ARCHITECTURE.read_text(encoding="utf-8").split("## Where things live")[1].splitlines():
        names = re.findall(r"`([\w/]+(?:\.py|/))`", line)
        if line.startswith("| **"):
            rooms = [ROOT / room for room in re.findall(r"`([\w/]+)`", line)]
            missing += [room for room in rooms if not (room / "__init__.py").exists()]
        elif rooms:
            places = [*rooms, *(room.parent for room in rooms)]
            missing += [name for name in names if not any((place / name).exists() for place in places)]
    assert rooms and missing == []
