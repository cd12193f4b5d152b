"""`ppcl-fx rewrite`: choose edits for a budget, or take a plan, and build the pluggable model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from ppcl_fx.cli import options as common
from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import File, Folder, Model, Overwrite
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import read_json
from ppcl_fx.io.options import Config, Flag
from ppcl_fx.io.owned_folders import STUDENT
from ppcl_fx.model.sources import check_source
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.costs import Costs
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.model.paper_plans import NamedPlan


class Wish(Config):
    """What a user asked for: an analysis to choose by, a plan by file or name, a checkpoint to take students from."""

    analysis: File = Field(None, description="what 'ppcl-fx analyze' wrote: RUN/analysis.json")
    costs: File = Field(
        None, description="with --latency: what each block costs, from 'python -m benchmarks.blocks MODEL'"
    )
    plan: Annotated[str | None, Flag(metavar="PLAN")] = Field(
        None,
        description="a plan to follow, instead of an analysis to choose by: a file, or paper:NAME for one of the paper",
    )
    released: Folder = Field(
        None,
        description="a checkpoint of the released layout, pruned from MODEL: its parts become the students. "
        "--plan says by which plan; told by the weights if left out",
    )
    calls: Folder = Field(
        None, description="recorded calls; RUN/calls beside the analysis if left out, where it was made from those"
    )

    def check(self, config: RewriteConfig) -> None:
        """Raise `PpclError` where the options contradict each other."""
        from ppcl_fx.model.paper_plans import is_name

        by_name = self.plan is not None and is_name(self.plan)
        if self.analysis is None and self.plan is None and self.released is None:
            raise PpclError("--analysis, --plan: give one of the two, the analysis to choose by or a plan to follow")
        if self.analysis is not None and (self.released is not None or (self.plan is not None and not by_name)):
            other = "--released" if self.released is not None else "--plan"
            raise PpclError(f"--analysis, {other}: give one of the two; with the second the choice is made")
        what = {"keep": "a share", "params": "a number of parameters", "latency": "a time"}
        asked = [name for name in what if getattr(config, name) is not None]
        if len(asked) > 1:
            words, flags = " or ".join(what[name] for name in asked), ", ".join(f"--{name}" for name in asked)
            raise PpclError(f"{flags}: give one of the {'two' if len(asked) == 2 else 'three'}, {words}")
        if asked and (self.plan is not None or self.released is not None):
            option = f"--{asked[0]}"
            raise PpclError(f"{option}: a plan has its size already; leave {option} out, or give --analysis alone")

    def named(self, config: RewriteConfig) -> NamedPlan | None:
        """Return the plan that was given by name, checked; None where none or a file was given."""
        from ppcl_fx.model import paper_plans as plans

        if self.plan is None or not plans.is_name(self.plan):
            return None
        found = plans.named(self.plan)
        found.plan(config.init)
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

    def plan_given(self, named: NamedPlan | None, config: RewriteConfig) -> Plan | None:
        """Return the plan to follow; None where an analysis chooses, or weights tell."""
        if named is None:
            found = None if self.plan is None else read_json(self.plan, Plan)
            if found is not None and not found.edits:
                raise PpclError(f"{self.plan}: holds no edit, so there is nothing to rewrite; add one")
            return found
        plan = named.plan(config.init)
        if self.analysis is None:
            return plan
        from ppcl_fx.passes.selection.sensitivity import predicted

        analysis = Redundancy.load(self.analysis)
        return predicted(analysis, plan).model_copy(update={"model": analysis.model})


@flagged
def rewrite(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STUDENT", help="Folder of the pluggable model.")],
    config: RewriteConfig,
    terminal: Terminal,
    wish: Wish,
    overwrite: Overwrite = False,
) -> CommandResult:
    """Cut MODEL by an analysis or a plan, and save teacher and student parts side by side in STUDENT.

    With --memory-limit the model is never loaded: weights go from its files to STUDENT's, tensor by tensor.
    """
    wish.check(config)
    measured = timed(config, wish.costs)
    named = wish.named(config)
    analysis, released = wish.analysis, wish.released
    if config.memory_limit is not None and released is not None:
        raise PpclError("--memory-limit, --released: a released checkpoint is joined in memory; leave one of them out")
    common.check_device(config.device, config.memory_limit is not None)
    folder = wish.calls or wish.calls_beside()
    reads = [model, analysis, wish.plan, released, folder, wish.costs]
    if analysis is None:
        why = "an analysis chooses by it, and there is none; leave it out, or give --analysis"
        common.refuse(config, ("select", "stream", "width"), why)
    common.check_output(out, kind=STUDENT, overwrite=overwrite, reads=reads)
    check_source(model)
    common.check_file(analysis, "what 'ppcl-fx analyze' wrote")
    common.check_folder(released, "a checkpoint of the released layout")
    common.check_folder(folder, "recorded calls with --calls", "index.json")

    import ppcl_fx

    chosen = wish.plan_given(named, config)
    promised = None
    if chosen is None and analysis is not None:
        chosen = ppcl_fx.select(Redundancy.load(analysis), config=config, costs=measured)
        promised = chosen.params
    recorded = common.open_calls(folder, terminal)
    if analysis is not None and wish.calls is None:
        made_from = Redundancy.load(analysis).calls
        if made_from and recorded.calls.fingerprint != made_from:
            advice = f"give those with --calls, or --calls {folder} to take these"
            raise PpclError(f"{folder}: not the calls that {analysis} was made from; {advice}")
    fingerprints = {analysis or Path(wish.plan or ""): chosen.model} if chosen is not None else {}
    fingerprints[recorded.folder] = recorded.calls.model
    if config.memory_limit is not None:
        import torch

        from ppcl_fx.model.rewrite import ProjectorFit, rewrite_streamed

        assert chosen is not None
        checkpoint = common.open_checkpoint(model, terminal, fingerprints)
        what = (checkpoint, chosen, out, recorded.calls)
        fit = ProjectorFit(config.memory_limit, torch.device(config.device))
        with terminal.step("rewriting") as progress:
            student = rewrite_streamed(*what, named=named, fit=fit, overwrite=overwrite, report=progress)
    elif released is not None:
        from ppcl_fx.formats.released import with_teacher

        teacher = common.open_teacher(model, terminal, fingerprints)
        with terminal.step("joining with the teacher"):
            student = with_teacher(released, teacher, recorded.calls.examples(), plan=chosen)
    else:
        assert chosen is not None
        teacher = common.open_teacher(model, terminal, fingerprints)
        with terminal.step("tracing"):
            graph = ppcl_fx.trace(teacher, recorded.calls.examples())
        with terminal.step("rewriting"):
            if named is not None:
                named.check(graph)
            student = ppcl_fx.rewrite(graph, chosen, recorded.calls)
    plugged = named.students(student) if named is not None else student.edits
    count, whole = student.param_count(plugged), student.teacher_params
    if promised is not None and count != promised:
        raise RuntimeError(f"the plan promised {promised} parameters and the model has {count}")
    if config.memory_limit is None:
        with terminal.step("saving"):
            student.plug(students=plugged).save(out, overwrite=overwrite)
    return _result(out, student.plan, plugged, count, whole)


def timed(config: RewriteConfig, costs: Path | None) -> Costs | None:
    """Return the costs for a budget of time; None where there is none."""
    latency = config.latency
    if latency is None:
        if costs is not None:
            raise PpclError("--costs: is for --latency; give how much time may stay, or leave --costs out")
        return None
    if costs is None:
        how = "measure it with 'python -m benchmarks.blocks MODEL' and give the file with --costs"
        raise PpclError(f"--latency {latency}: what each block costs is not known; {how}")
    if config.select not in (None, "budget"):
        words = "this rule knows no time; leave --select out, or give 'budget'"
        raise PpclError(f"--latency, --select {config.select}: {words}")
    measured = Costs.load(costs)
    try:
        measured.milliseconds(latency)
    except PpclError as error:
        raise PpclError(f"--{error}") from None
    return measured


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
