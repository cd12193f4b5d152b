"""`ppcl-fx rewrite`: choose edits for a budget, or take a plan, and build the pluggable model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import Model, Overwrite, check_device, check_file, check_folder, check_output, refuse
from ppcl_fx.cli.teacher import Recorded, open_calls, open_checkpoint, open_teacher
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.io.owned_folders import STUDENT
from ppcl_fx.model.sources import check_source
from ppcl_fx.passes.options import RewriteConfig

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.paper_plans import NamedPlan
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.schema.costs import Costs
    from ppcl_fx.schema.plan import Plan


@flagged
def rewrite(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STUDENT", help="Folder of the pluggable model.")],
    config: RewriteConfig,
    terminal: Terminal,
    analysis: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What 'ppcl-fx analyze' wrote: RUN/analysis.json.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --latency: what each block costs, from 'python -m benchmarks.blocks MODEL'."
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="A plan to follow, instead of an analysis to choose by: a file, or paper:NAME for one of the paper.",
        ),
    ] = None,
    released: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A checkpoint of the released layout, pruned from MODEL: its parts become the students. "
            "--plan says by which plan; told by the weights if left out.",
        ),
    ] = None,
    calls: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Recorded calls; RUN/calls beside the analysis if left out, where it was made from those.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> CommandResult:
    """Cut MODEL by an analysis or a plan, and save teacher and student parts side by side in STUDENT.

    With --memory-limit the model is never loaded: weights go from its files to STUDENT's, tensor by tensor.
    """
    wish = Wish(analysis, plan, released, config)
    wish.check()
    measured = timed(config, costs)
    named = wish.named()
    if config.memory_limit is not None and released is not None:
        raise PpclError("--memory-limit, --released: a released checkpoint is joined in memory; leave one of them out")
    check_device(config.device, config.memory_limit is not None)
    folder = calls or wish.calls_beside()
    reads = [model, analysis, plan, released, folder, costs]
    if analysis is None:
        why = "an analysis chooses by it, and there is none; leave it out, or give --analysis"
        refuse(config, ("select", "stream", "width"), why)
    check_output(out, kind=STUDENT, overwrite=overwrite, reads=reads)
    check_source(model)
    check_file(analysis, "what 'ppcl-fx analyze' wrote")
    check_folder(released, "a checkpoint of the released layout")
    check_folder(folder, "recorded calls with --calls", "index.json")

    import ppcl_fx

    chosen = wish.plan_given(named)
    promised = None
    if chosen is None and analysis is not None:
        chosen = ppcl_fx.select(ppcl_fx.Redundancy.load(analysis), config=config, costs=measured)
        promised = chosen.params
    recorded = open_calls(folder, terminal)
    if analysis is not None and calls is None:
        _check_calls(recorded, analysis)
    fingerprints = {analysis or Path(plan or ""): chosen.model} if chosen is not None else {}
    fingerprints[recorded.folder] = recorded.calls.model
    if config.memory_limit is not None:
        import torch

        from ppcl_fx.model.rewrite import ProjectorFit, rewrite_streamed

        assert chosen is not None
        checkpoint = open_checkpoint(model, terminal, fingerprints)
        with terminal.step("rewriting") as progress:
            student = rewrite_streamed(
                checkpoint,
                chosen,
                out,
                recorded.calls,
                named=named,
                fit=ProjectorFit(config.memory_limit, torch.device(config.device)),
                overwrite=overwrite,
                report=progress,
            )
    elif released is not None:
        from ppcl_fx.formats.released import with_teacher

        teacher = open_teacher(model, terminal, fingerprints)
        with terminal.step("joining with the teacher"):
            student = with_teacher(released, teacher, recorded.calls.examples(), plan=chosen)
    else:
        assert chosen is not None
        teacher = open_teacher(model, terminal, fingerprints)
        with terminal.step("tracing"):
            graph = ppcl_fx.trace(teacher, recorded.calls.examples())
        with terminal.step("rewriting"):
            student = _rewritten(graph, chosen, named, recorded.calls)
    plugged = named.students(student) if named is not None else student.edits
    count, whole = student.param_count(plugged), student.teacher_params
    if promised is not None and count != promised:
        raise RuntimeError(f"the plan promised {promised} parameters and the model has {count}")
    if config.memory_limit is None:
        with terminal.step("saving"):
            student.plug(students=plugged).save(out, overwrite=overwrite)
    return _result(out, student.plan, plugged, count, whole)


@dataclass(frozen=True)
class Wish:
    """What a user asked for: an analysis to choose by, a plan by file or name, a checkpoint to take students from."""

    analysis: Path | None
    plan: str | None
    released: Path | None
    config: RewriteConfig

    def check(self) -> None:
        """Raise `PpclError` where the options contradict each other."""
        from ppcl_fx.model.paper_plans import is_name

        by_name = self.plan is not None and is_name(self.plan)
        if self.analysis is None and self.plan is None and self.released is None:
            raise PpclError("--analysis, --plan: give one of the two, the analysis to choose by or a plan to follow")
        if self.analysis is not None and (self.released is not None or (self.plan is not None and not by_name)):
            other = "--released" if self.released is not None else "--plan"
            raise PpclError(f"--analysis, {other}: give one of the two; with the second the choice is made")
        what = {"keep": "a share", "params": "a number of parameters", "latency": "a time"}
        asked = [name for name in what if getattr(self.config, name) is not None]
        if len(asked) > 1:
            words, flags = " or ".join(what[name] for name in asked), ", ".join(f"--{name}" for name in asked)
            raise PpclError(f"{flags}: give one of the {'two' if len(asked) == 2 else 'three'}, {words}")
        if asked and (self.plan is not None or self.released is not None):
            option = f"--{asked[0]}"
            raise PpclError(f"{option}: a plan has its size already; leave {option} out, or give --analysis alone")

    def named(self) -> NamedPlan | None:
        """Return the plan that was given by name, checked; None where none or a file was given."""
        from ppcl_fx.model import paper_plans as plans

        if self.plan is None or not plans.is_name(self.plan):
            return None
        found = plans.named(self.plan)
        found.plan(self.config.init)
        return found

    def calls_beside(self) -> Path:
        """Return where recorded calls lie when nobody says so: beside the analysis or the plan."""
        from ppcl_fx.model.paper_plans import is_name

        if self.analysis is not None:
            return self.analysis.parent / "calls"
        if self.plan is not None and not is_name(self.plan):
            return Path(self.plan).parent / "calls"
        what = f"--plan {self.plan}: no calls lie beside a plan of this package" if self.plan else "--released"
        raise PpclError(f"{what}; give recorded calls with --calls")

    def plan_given(self, named: NamedPlan | None) -> Plan | None:
        """Return the plan to follow; None where an analysis chooses, or weights tell."""
        if named is None:
            return _read_plan(Path(self.plan)) if self.plan is not None else None
        plan = named.plan(self.config.init)
        if self.analysis is None:
            return plan
        import ppcl_fx
        from ppcl_fx.passes.selection.sensitivity import predicted

        analysis = ppcl_fx.Redundancy.load(self.analysis)
        return predicted(analysis, plan).model_copy(update={"model": analysis.model})


def timed(config: RewriteConfig, costs: Path | None) -> Costs | None:
    """Return the costs for a budget of time; None where there is none."""
    latency = config.latency
    if latency is None:
        if costs is not None:
            raise PpclError("--costs: is for --latency; give how much time may stay, or leave --costs out")
        return None
    if costs is None:
        raise PpclError(
            f"--latency {latency}: what each block costs is not known; measure it with "
            "'python -m benchmarks.blocks MODEL' and give the file with --costs"
        )
    if config.select not in (None, "budget"):
        words = "this rule knows no time; leave --select out, or give 'budget'"
        raise PpclError(f"--latency, --select {config.select}: {words}")
    from ppcl_fx.schema.costs import Costs

    measured = Costs.load(costs)
    try:
        measured.milliseconds(latency)
    except PpclError as error:
        raise PpclError(f"--{error}") from None
    return measured


def _rewritten(graph: GraphModule, plan: Plan, named: NamedPlan | None, calls: Calls) -> PluggableModel:
    import ppcl_fx

    if named is not None:
        named.check(graph)
    return ppcl_fx.rewrite(graph, plan, calls)


def _check_calls(recorded: Recorded, analysis: Path) -> None:
    """Refuse calls beside an analysis that was made from others."""
    import ppcl_fx

    made_from = ppcl_fx.Redundancy.load(analysis).calls
    if made_from and recorded.calls.fingerprint != made_from:
        raise PpclError(
            f"{recorded.folder}: not the calls that {analysis} was made from; give those with --calls, or --calls "
            f"{recorded.folder} to take these"
        )


def _read_plan(path: Path) -> Plan:
    from ppcl_fx.io.files import read_json
    from ppcl_fx.schema.plan import Plan

    plan = read_json(path, Plan)
    if not plan.edits:
        raise PpclError(f"{path}: holds no edit, so there is nothing to rewrite; add one")
    return plan


def _result(out: Path, plan: Plan, plugged: list[str], params: int, whole: int) -> CommandResult:
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
    return CommandResult(data, lines)
