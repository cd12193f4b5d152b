"""The program `ppcl-fx`: the steps, each from its own file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ppcl_fx._version import __version__
from ppcl_fx.cli.analyze import analyze
from ppcl_fx.cli.boundary import CommandResult, guarded
from ppcl_fx.cli.export import build, export
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import check_folder
from ppcl_fx.cli.passes import passes, run_passes
from ppcl_fx.cli.rewrite import rewrite
from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.cli.train import train


@flagged
def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A student, engines, calls, checkpoints, a RUN, a model; or a folder that holds some of them.",
        ),
    ],
    terminal: Terminal,
) -> CommandResult:
    """Read every byte of FOLDER: sums, digests, fingerprints, and that every weight is a finite number.

    Loading compares samples of the weights, which is quick at any size; this finds a single changed bit.
    """
    check_folder(folder, "a folder that ppcl-fx or diffusers wrote")
    from ppcl_fx.cli.integrity import verify as run

    with terminal.step("reading everything"), quiet_diffusers():
        found = run(folder)
    data = [{"path": str(one.path), "what": one.what, "compared": one.compared} for one in found]
    lines = [f"{one.what}: {one.compared}: {one.path}" for one in found]
    return CommandResult(
        {"folder": str(folder), "checked": data}, [*lines, f"{len(found)} parts of {folder} are whole"]
    )


app = typer.Typer(
    name="ppcl-fx",
    help="Prune a diffusion transformer: analyze, rewrite, train, export.",
    epilog="MODEL is a diffusers folder (a pipeline or a bare transformer), a hub id, or 'shapes', the shipped one.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (analyze, rewrite, train, export, build, verify, passes, run_passes):
    app.command(command.__name__.replace("_", "-"))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ppcl-fx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune a diffusion transformer: analyze, rewrite, train, export."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (by default the program's own arguments) and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda args: app(args=args or ["--help"], prog_name="ppcl-fx", standalone_mode=False), arguments)
