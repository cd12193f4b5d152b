"""The program `ppcl-fx`: the steps, each from its own file, and the commands that only look."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx._version import __version__
from ppcl_fx.cli.analyze import analyze
from ppcl_fx.cli.boundary import CommandResult, guarded
from ppcl_fx.cli.export import build, export
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import Model, check_folder, open_calls, open_checkpoint
from ppcl_fx.cli.rewrite import rewrite
from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.cli.train import train
from ppcl_fx.errors import Refusal

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.passes.contract import Pass


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


@flagged
def passes(terminal: Terminal) -> CommandResult:
    """List the passes: name, kind, numerics, options, and what each does."""
    with terminal.step("loading the passes"), quiet_diffusers():
        from ppcl_fx.passes.registry import described, registered

        found = [described(kind) for kind in registered().values()]
    lines = []
    for one in found:
        where = "" if one.written else "; in Python only"
        lines += [f"{one.name} ({one.kind}, {one.numerics}{where}): {one.does}", *(f"    {o}" for o in one.options)]
    return CommandResult({"passes": [asdict(one) for one in found]}, lines)


@flagged
def run_passes(
    model: Model,
    text: Annotated[
        str, typer.Argument(metavar="PASSES", help="As in 'cut-depth{stack=blocks,first=3,last=5},narrow'.")
    ],
    calls: Annotated[Path, typer.Option(metavar="FOLDER", help="Recorded calls; the model is traced with the first.")],
    terminal: Terminal,
) -> CommandResult:
    """Trace MODEL, its weights left on disk, run PASSES in their order, and say what each did."""
    check_folder(calls, "recorded calls")
    with quiet_diffusers():
        from ppcl_fx.ir.graphs import draft, parameter_count
        from ppcl_fx.passes.registry import parse
        from ppcl_fx.tracing import trace

        pipeline = parse(text)
        recorded = open_calls(calls, terminal)
        checkpoint = open_checkpoint(model, terminal, {calls: recorded.calls.model})
        with terminal.step("tracing"):
            gm = draft(trace(checkpoint.model, recorded.calls.examples()))
        params = parameter_count(gm)
        did = [_ran(pass_, gm) for pass_ in pipeline.passes]
    left = parameter_count(gm)
    lines = [f"{one['pass']}: {_words(one)}" for one in did]
    lines.append(f"{params:,} parameters before, {left:,} after")
    return CommandResult({"model": model, "params_before": params, "params_after": left, "passes": did}, lines)


def _ran(pass_: Pass, gm: GraphModule) -> dict[str, Any]:
    """Run one pass and return what it did."""
    did: dict[str, Any] = {"pass": str(pass_), "modified": False, "nodes": [len(gm.graph.nodes)]}
    try:
        result = pass_(gm)
        did["modified"] = result.modified
        did["refused"] = [{"reason": one.reason, "nodes": list(one.nodes)} for one in result.refused]
    except Refusal as reason:
        did["refused"] = [{"reason": str(reason), "nodes": []}]
    did["nodes"].append(len(gm.graph.nodes))
    return did


def _words(did: dict[str, Any]) -> str:
    before, after = did["nodes"]
    said = f"modified, {before} nodes before, {after} after" if did["modified"] else "nothing to do"
    reasons = [f"refused: {one['reason']}" for one in did["refused"]]
    return "; ".join(reasons if reasons and not did["modified"] else [said, *reasons])


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
