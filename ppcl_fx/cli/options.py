"""Options that several commands share, and the checks that come before any long work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl_fx.errors import PpclError, near
from ppcl_fx.files import check_writable
from ppcl_fx.owned import Kind, check_no_link, check_replaceable, foreign

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
MOST = 10**9
"""The largest count of anything that is counted: steps, calls, runs."""
MOST_STEPS = 10_000
"""The most denoising steps of one picture: ten times what schedulers are trained with."""
MOST_SEED = 2**63 - 1
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Leave the weights on disk and work block by block within this much memory, such as 12GiB.",
    ),
]
Device = Annotated[str, typer.Option(help="Where --memory-limit computes: 'cpu', 'cuda'.")]

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
MOST_PARAMS = 10**15
DEVICES = ("cpu", "cuda", "mps", "xpu")


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that were typed and have no use.

    Args:
        context: of the command.
        names: the names of its parameters.
        why: the reason, and what to do.

    Raises:
        PpclError: one of them was typed.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise PpclError(f"--{name.replace('_', '-')}: {why}")


def check_folder(folder: Path | None, what: str, manifest: str | None = None) -> None:
    """Refuse a folder that is not there, or lacks the file that tells it, before anything slow is imported.

    Args:
        folder: the folder; None passes.
        what: what to give instead, for the line.
        manifest: the name of a file in it; None for any folder.

    Raises:
        PpclError: there is no such folder or file.
    """
    if folder is None:
        return
    if not folder.is_dir():
        beside = [str(folder.parent / p.name) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise PpclError(f"{folder}: no such folder{near(str(folder), beside)}; give {what}")
    if manifest is not None and not (folder / manifest).exists():
        raise PpclError(f"{folder / manifest}: no such file; give {what}")


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there, before anything slow is imported.

    Raises:
        PpclError: there is no such file.
    """
    if path is not None and not path.exists():
        beside = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PpclError(f"{path}: no such file{near(str(path), beside)}; give {what}")


def parse_device(text: str, limit: str | None) -> str:
    """Return the name of a device that torch has here.

    Raises:
        PpclError: there is no such device, or it is given without ``--memory-limit``.
    """
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not (index.isascii() and index.isdecimal() and len(index) < 4)):
        raise PpclError(f"--device {text}: no device{near(kind, DEVICES)}; give one such as 'cpu', 'cuda' or 'cuda:1'")
    if text == "cpu":
        return text
    if limit is None:
        raise PpclError(f"--device {text}: only block by block; give --memory-limit too")
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise PpclError(f"--device {text}: not here ({str(error).splitlines()[0]}); give 'cpu'") from None
    return text


def parse_keep(text: str) -> float:
    """Return the share of parameters that stays, in (0, 1]."""
    try:
        keep = float(text)
    except ValueError:
        raise PpclError(
            f"--keep {text}: not a number; give the share of parameters that stays, such as 0.5"
        ) from None
    if not 0.0 < keep <= 1.0:  # NaN fails too
        raise PpclError(
            f"--keep {text}: the share of parameters that stays is above 0 and at most 1, such as 0.5"
        )
    return keep


def parse_params(text: str) -> int:
    """Return the number of parameters that ``12B``, ``11.9e9``, ``500M`` or ``2705371`` stands for."""
    digits, unit = (text[:-1], UNITS[text[-1:].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        number = float(digits) * unit
    except ValueError:
        number = 0.0
    if not 1.0 <= number <= MOST_PARAMS:  # NaN fails too
        raise PpclError(f"--params {text}: not a number of parameters; give one such as 12B, 500M or 2705371")
    return round(number)


def parse_keeps(text: str) -> list[float]:
    """Return the shares of a list such as ``1.0,0.7,0.5``, in the order given, each once."""
    keeps = [parse_keep(part.strip()) for part in text.split(",")]
    doubled = sorted({keep for keep in keeps if keeps.count(keep) > 1})
    if doubled:
        raise PpclError(f"--keep {text}: {doubled[0]} is there twice; give each share once")
    return keeps


def parse_counts(option: str, text: str) -> list[int]:
    """Return the positive integers of a list such as ``600,200,100``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,10}", part) and 0 < int(part) <= MOST for part in parts):
        raise PpclError(
            f"{option} {text}: give whole numbers from 1 to {MOST} with commas between them, such as 600,200,100"
        )
    return [int(part) for part in parts]


def choice(option: str, value: str, known: Sequence[str]) -> str:
    """Return `value` if it is one of `known`, else raise with the nearest one."""
    if value not in known:
        raise PpclError(f"{option} {value}: not one of {', '.join(known)}{near(value, known)}")
    return value


def choices(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the names of a list with commas, each one of `known` and there once."""
    values = [choice(option, part.strip(), known) for part in text.split(",")]
    doubled = sorted({value for value in values if values.count(value) > 1})
    if doubled:
        raise PpclError(f"{option} {text}: {doubled[0]} is there twice; give each once")
    return values


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None, so that defaults stay where they are used."""
    return {name: value for name, value in options.items() if value is not None}


def check_output(
    path: Path, *, kind: Kind | None = None, overwrite: bool = False, reads: Iterable[str | Path | None] = ()
) -> None:
    """Refuse an output that exists or cannot be written, before any work is done; nothing is left behind.

    Args:
        path: the folder to be written.
        kind: what it will be; None where files are added to what is there.
        overwrite: replace a folder of that kind.
        reads: what the command reads; None and names of nothing are passed over.

    Raises:
        PpclError: `path` is a file, is a folder with something in it (unless `overwrite`, and it may be replaced), or
            cannot be written.
    """
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
