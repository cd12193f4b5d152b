"""Weights that exports wrote and that no graph uses any more."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ppcl_fx.export.artefacts import cards_in
from ppcl_fx.export.claim import is_store
from ppcl_fx.export.names import DATA, WEIGHTS
from ppcl_fx.files import inside


def weights_of(folder: Path, manifests: Collection[str]) -> set[str]:
    """Return the weight files that manifests of a folder name."""
    cards = cards_in(folder)
    return {weight.file for name in manifests if name in cards for weight in cards[name].weights}


def drop_unused(folder: Path, names: Collection[str]) -> None:
    """Remove those of some weight files that exports wrote and no manifest names; a student's own files stay."""
    kept = weights_of(folder, list(cards_in(folder)))
    ours = is_store(folder / WEIGHTS)
    # What an export that ended early replaced is named by no manifest any more.
    files = {path.relative_to(folder).as_posix() for path in (folder / WEIGHTS).rglob("*") if path.is_file()}
    families = {_family(name) for name in {*names, *kept}}
    for name in sorted({*names, *(file for file in files if _family(file) in families)} - kept):
        first = PurePosixPath(name).parts[0]
        if (first == WEIGHTS and ours) or (first == name and name.endswith(DATA)):
            inside(folder, name).unlink(missing_ok=True)
    if ours:
        prune(folder / WEIGHTS)


def _family(name: str) -> str:
    """Return the name that a file would have if it had not been put aside (`ppcl_fx.export.weight_store`)."""
    return re.sub(r"-[0-9a-f]{8}(?=\.safetensors$)", "", name)


def prune(folder: Path) -> None:
    """Remove a folder and what is in it where they are empty."""
    for child in list(folder.iterdir()) if folder.is_dir() else ():
        if child.is_dir():
            prune(child)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
