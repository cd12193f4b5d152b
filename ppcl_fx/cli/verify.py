"""`ppcl-fx verify`: read everything of a folder, and compare it with what was written down of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, Verbose, check_folder
from ppcl_fx.cli.terminal import Terminal, quiet_diffusers


def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A student, engines, calls, checkpoints, a RUN, a model; or a folder that holds some of them.",
        ),
    ],
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Read every byte of FOLDER: sums, digests, fingerprints, and that every weight is a finite number.

    Loading compares samples of the weights, which is quick at any size; this finds a single changed bit.
    """
    check_folder(folder, "a folder that ppcl-fx or diffusers wrote")
    from ppcl_fx.verify import verify as run

    terminal = Terminal(verbose)
    with terminal.step("reading everything"), quiet_diffusers():
        found = run(folder)
    data = [{"path": str(one.path), "what": one.what, "compared": one.compared} for one in found]
    lines = [f"{one.what}: {one.compared}: {one.path}" for one in found]
    return Result({"folder": str(folder), "checked": data}, [*lines, f"{len(found)} parts of {folder} are whole"])
