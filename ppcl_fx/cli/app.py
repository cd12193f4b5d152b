"""The program `ppcl-fx`: the steps, each from its own file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ppcl_fx._version import __version__
from ppcl_fx.cli.analyze import analyze
from ppcl_fx.cli.boundary import guarded
from ppcl_fx.cli.build import build
from ppcl_fx.cli.export import export
from ppcl_fx.cli.rewrite import rewrite
from ppcl_fx.cli.train import train
from ppcl_fx.cli.verify import verify

app = typer.Typer(
    name="ppcl-fx",
    help="Prune a diffusion transformer: analyze, rewrite, train, export.",
    epilog="MODEL is a diffusers folder (a pipeline or a bare transformer), a hub id, or 'shapes', the shipped one.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (analyze, rewrite, train, export, build, verify):
    app.command(command.__name__)(command)


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
    return guarded(
        lambda args: app(args=args or ["--help"], prog_name="ppcl-fx", standalone_mode=False), arguments
    )
