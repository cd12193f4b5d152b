"""`ppcl-fx rewrite`: choose edits for a budget, or take a plan, and build the pluggable model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import (
    Device,
    Json,
    MemoryLimit,
    Overwrite,
    Verbose,
    check_output,
    choice,
    given,
    parse_device,
    parse_keep,
)
from ppcl_fx.cli.teacher import open_calls, open_checkpoint, open_teacher
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size

if TYPE_CHECKING:
    from ppcl_fx.plan import Plan

INITS = ("first", "middle")
DEFAULT_KEEP = 0.5


def rewrite(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or 'shapes'.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="STUDENT", help="Folder of the pluggable model.")
    ],
    analysis: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What 'ppcl-fx analyze' wrote: RUN/analysis.json.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Share of the parameters that stays, 0.5 if left out.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A plan to follow, instead of an analysis to choose by."),
    ] = None,
    calls: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Recorded calls; RUN/calls beside the file if left out."),
    ] = None,
    rule: Annotated[str, typer.Option(help="Selection rule: 'paper', or 'uniform' as a control.")] = "paper",
    stream: Annotated[
        str | None, typer.Option(help="Stream that decides; the one of the analysis if left out.")
    ] = None,
    init: Annotated[str, typer.Option(help="Block a student starts from: 'first' or 'middle'.")] = "first",
    width: Annotated[bool, typer.Option(help="Allow feed-forward and text-stream projectors.")] = True,
    memory_limit: MemoryLimit = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Cut MODEL by an analysis or a plan, and save teacher and student parts side by side in STUDENT.

    With --memory-limit the model is never loaded: weights go from its files to STUDENT's, tensor by tensor.
    """
    given_file = _one_of(analysis, plan)
    if plan is not None and keep is not None:
        raise PpclError("--keep: a plan has its size already; leave --keep out, or give --analysis")
    share = parse_keep(keep) if keep is not None else DEFAULT_KEEP
    choice("--init", init, INITS)
    limit = parse_size("--memory-limit", memory_limit) if memory_limit is not None else None
    where = parse_device(device, memory_limit)
    check_output(out, overwrite=overwrite)
    terminal = Terminal(verbose)

    import ppcl_fx

    if analysis is not None:
        options = given(rule=rule, stream=stream, width=width, init=init)
        chosen = ppcl_fx.select(ppcl_fx.Redundancy.load(analysis), keep=share, **options)
    else:
        chosen = _read_plan(given_file)
    recorded = open_calls(calls or given_file.parent / "calls", terminal)
    fingerprints = {given_file: chosen.model, recorded.folder: recorded.calls.model}
    if limit is not None:
        from ppcl_fx.passes.stream_rewrite import rewrite_streamed

        checkpoint = open_checkpoint(model, terminal, fingerprints)
        with terminal.step("rewriting") as progress:
            student = rewrite_streamed(
                checkpoint,
                chosen,
                out,
                recorded.calls,
                overwrite=overwrite,
                memory_limit=limit,
                report=progress,
                device=where,
            )
    else:
        teacher = open_teacher(model, terminal, fingerprints)
        with terminal.step("tracing"):
            graph = ppcl_fx.trace(teacher, recorded.calls.examples())
        with terminal.step("rewriting"):
            student = ppcl_fx.rewrite(graph, chosen, recorded.calls)
    params, whole = student.param_count(student.edits), student.teacher_params
    if analysis is not None and params != chosen.params:
        raise RuntimeError(f"the plan promised {chosen.params} parameters and the model has {params}")
    if limit is None:
        with terminal.step("saving"):
            student.plug(students=student.edits).save(out, overwrite=overwrite)
    return _result(out, student.plan, params, whole)


def _one_of(analysis: Path | None, plan: Path | None) -> Path:
    if analysis is not None and plan is None:
        return analysis
    if plan is not None and analysis is None:
        return plan
    raise PpclError("--analysis, --plan: give one of the two, the analysis to choose by or a plan to follow")


def _read_plan(path: Path) -> Plan:
    from ppcl_fx.files import read_json
    from ppcl_fx.plan import Plan

    plan = read_json(path, Plan)
    if not plan.edits:
        raise PpclError(f"{path}: holds no edit, so there is nothing to rewrite; add one")
    return plan


def _result(out: Path, plan: Plan, params: int, whole: int) -> Result:
    data = {
        "student": str(out),
        "teacher_params": whole,
        "params": params,
        "keep": params / whole,
        "edits": plan.ids,
        "reason": plan.reason,
    }
    lines = [*plan.reason, *plan.ids, f"{params:,} of {whole:,} parameters ({params / whole:.2%}): {out}"]
    return Result(data, lines)
