"""`ppcl-fx rewrite`: choose edits for a budget, or take a plan, and build the pluggable model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, Overwrite, Verbose, check_output, choice, given, parse_keep
from ppcl_fx.cli.teacher import open_calls, open_teacher
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError

if TYPE_CHECKING:
    from ppcl_fx.plan import Plan
    from ppcl_fx.plans import NamedPlan

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
        str | None,
        typer.Option(
            metavar="PLAN",
            help="A plan to follow, instead of an analysis to choose by: a file, or paper:NAME for one of the paper.",
        ),
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
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Cut MODEL by an analysis or a plan, and save teacher and student parts side by side in STUDENT."""
    choice("--init", init, INITS)
    given_file = _one_of(analysis, plan)
    named = _named(plan, init, calls)
    if plan is not None and keep is not None:
        raise PpclError("--keep: a plan has its size already; leave --keep out, or give --analysis")
    share = parse_keep(keep) if keep is not None else DEFAULT_KEEP
    check_output(out, overwrite=overwrite)
    terminal = Terminal(verbose)

    import ppcl_fx

    if analysis is not None:
        options = given(rule=rule, stream=stream, width=width, init=init)
        chosen = ppcl_fx.select(ppcl_fx.Redundancy.load(analysis), keep=share, **options)
    elif named is not None:
        chosen = named.plan(_init(init))
    else:
        chosen = _read_plan(given_file)
    recorded = open_calls(calls or given_file.parent / "calls", terminal)
    teacher = open_teacher(
        model, terminal, fingerprints={given_file: chosen.model, recorded.folder: recorded.calls.model}
    )
    with terminal.step("tracing"):
        graph = ppcl_fx.trace(teacher, recorded.calls.examples())
    with terminal.step("rewriting"):
        if named is not None:
            named.check(graph)
        student = ppcl_fx.rewrite(graph, chosen, recorded.calls)
    plugged = named.students(student) if named is not None else student.edits
    params, whole = student.param_count(plugged), student.teacher_params
    if analysis is not None and params != chosen.params:
        raise RuntimeError(f"the plan promised {chosen.params} parameters and the model has {params}")
    with terminal.step("saving"):
        student.plug(students=plugged).save(out, overwrite=overwrite)
    return _result(out, student.plan, plugged, params, whole)


def _one_of(analysis: Path | None, plan: str | None) -> Path:
    if analysis is not None and plan is None:
        return analysis
    if plan is not None and analysis is None:
        return Path(plan)
    raise PpclError("--analysis, --plan: give one of the two, the analysis to choose by or a plan to follow")


def _named(plan: str | None, init: str, calls: Path | None) -> NamedPlan | None:
    """The plan that was given by name, checked; None where none or a file was given."""
    from ppcl_fx import plans

    if plan is None or not plans.is_name(plan):
        return None
    found = plans.named(plan)
    found.plan(_init(init))
    if calls is None:
        raise PpclError(f"--plan {plan}: no calls lie beside a plan of this package; give them with --calls")
    return found


def _init(init: str) -> Literal["first", "middle"]:
    return "middle" if init == "middle" else "first"


def _read_plan(path: Path) -> Plan:
    from ppcl_fx.files import read_json
    from ppcl_fx.plan import Plan

    plan = read_json(path, Plan)
    if not plan.edits:
        raise PpclError(f"{path}: holds no edit, so there is nothing to rewrite; add one")
    return plan


def _result(out: Path, plan: Plan, plugged: list[str], params: int, whole: int) -> Result:
    back = [edit for edit in plan.ids if edit not in plugged]
    data = {
        "student": str(out),
        "teacher_params": whole,
        "params": params,
        "keep": params / whole,
        "edits": plan.ids,
        "plugged": plugged,
        "reason": plan.reason,
    }
    swapped = [f"swapped back to the teacher for the budget: {', '.join(back)}"] if back else []
    lines = [*plan.reason, *plan.ids, *swapped, f"{params:,} of {whole:,} parameters ({params / whole:.2%}): {out}"]
    return Result(data, lines)
