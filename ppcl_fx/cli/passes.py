"""`ppcl-fx passes` and `ppcl-fx run-passes`: which passes there are, and what some of them do to a traced model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import check_folder
from ppcl_fx.cli.teacher import open_calls, open_checkpoint
from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.errors import Refusal

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.passes.contract import Pass


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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or 'shapes'.")],
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
    before = len(gm.graph.nodes)
    try:
        result = pass_(gm)
        modified = result.modified
        refused = [{"reason": one.reason, "nodes": list(one.nodes)} for one in result.refused]
    except Refusal as reason:
        modified, refused = False, [{"reason": str(reason), "nodes": []}]
    after = len(gm.graph.nodes)
    return {"pass": str(pass_), "modified": modified, "nodes": [before, after], "refused": refused}


def _words(did: dict[str, Any]) -> str:
    before, after = did["nodes"]
    said = f"modified, {before} nodes before, {after} after" if did["modified"] else "nothing to do"
    reasons = [f"refused: {one['reason']}" for one in did["refused"]]
    return "; ".join(reasons if reasons and not did["modified"] else [said, *reasons])
