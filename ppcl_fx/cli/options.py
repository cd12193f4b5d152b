"""Options that several commands share, and the checks that come before any long work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import check_writable
from ppcl_fx.io.options import Config, flag_of
from ppcl_fx.io.owned_folders import Kind, check_no_link, check_replaceable, foreign

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or 'shapes'.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
DEVICES = ("cpu", "cuda", "mps", "xpu")


def refuse(config: Config, names: Iterable[str], why: str) -> None:
    """Refuse options that were given and have no use."""
    for name in config.given(names):
        raise PpclError(f"{flag_of(type(config), name)}: {why}")


def check_folder(folder: Path | None, what: str, manifest: str | None = None) -> None:
    """Refuse a folder that is not there, or lacks the file that tells it, before anything slow is imported."""
    if folder is None:
        return
    if not folder.is_dir():
        beside = [str(folder.parent / p.name) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise PpclError(f"{folder}: no such folder{near(str(folder), beside)}; give {what}")
    if manifest is not None and not (folder / manifest).exists():
        raise PpclError(f"{folder / manifest}: no such file; give {what}")


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there, before anything slow is imported."""
    if path is not None and not path.exists():
        beside = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PpclError(f"{path}: no such file{near(str(path), beside)}; give {what}")


def check_device(text: str, limited: bool) -> None:
    """Refuse a device that torch does not have here."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not (index.isascii() and index.isdecimal() and len(index) < 4)):
        raise PpclError(f"--device {text}: no device{near(kind, DEVICES)}; give one such as 'cpu', 'cuda' or 'cuda:1'")
    if text == "cpu":
        return
    if not limited:
        raise PpclError(f"--device {text}: only block by block; give --memory-limit too")
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise PpclError(f"--device {text}: not here ({str(error).splitlines()[0]}); give 'cpu'") from None


def check_output(
    path: Path, *, kind: Kind | None = None, overwrite: bool = False, reads: Iterable[str | Path | None] = ()
) -> None:
    """Refuse an output that exists or cannot be written, before any work is done; nothing is left behind."""
    if path.exists() and not path.is_dir():
        raise PpclError(f"{path}: is a file, and a folder is to be written there; choose another output")
    if kind is not None and path.is_dir() and any(path.iterdir()):
        if overwrite:
            check_no_link(path)
            check_replaceable(path, kind, [read for read in reads if read is not None])
        else:
            way = ", or replace it with --overwrite" if foreign(path, kind) is None else ""
            raise PpclError(f"{path}: already exists; choose another output{way}")
    check_writable(path)
