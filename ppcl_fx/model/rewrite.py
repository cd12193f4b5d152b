"""From a plan to a pluggable model, in memory or from teacher shards to a student folder, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import need_room, new_file, new_folder, write_json
from ppcl_fx.io.shards import INDEX, ONE_FILE, Shards, form_bytes, write_long
from ppcl_fx.ir.executor import Residency
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.spill import Spill
from ppcl_fx.model.pluggable import STUDENTS, TEACHER, PluggableModel, student_forms
from ppcl_fx.model.retrace import insert_edits as insert_edits
from ppcl_fx.passes.calibration.calibration import Notify, silent
from ppcl_fx.passes.calibration.initialise import fit_on_disk, fit_projectors
from ppcl_fx.passes.calibration.memory_estimate import state_budget
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace

if TYPE_CHECKING:
    from ppcl_fx.model.paper_plans import NamedPlan
    from ppcl_fx.tracing.meta_model import Checkpoint


def rewrite(gm: GraphModule, plan: Plan, calls: Calls | None = None) -> PluggableModel:
    """Rewrite a traced teacher by a plan into a pluggable model, with no edit plugged.

    Args:
        gm: the traced teacher; stays as it is, and its parameters are shared.
        plan: the edits.
        calls: recorded calls to initialise the projectors by least squares; without them they start as the identity.

    Raises:
        PpclError: the plan was made for another model, or contradicts itself.
        Refusal: an edit does not fit the model; the message says why.
    """
    model = _pluggable(gm, plan)
    if calls is not None:
        fit_projectors(model.graph, (call.kwargs for call in calls))
    return model.train(gm.training)


def _pluggable(gm: GraphModule, plan: Plan) -> PluggableModel:
    mine = graph_info(gm).get("model", "")
    if plan.model and mine and plan.model != mine:
        raise PpclError(
            f"the plan was made for another model (fingerprint {plan.model[:12]}, this one is {mine[:12]}); "
            "analyse this model and select again"
        )
    return PluggableModel(insert_edits(gm, plan), plan.model_copy(update={"model": plan.model or mine}))


@dataclass(frozen=True)
class ProjectorFit:
    """How projectors are fitted: bytes that the process may hold (as in `analyze_streamed`), and where to compute."""

    memory_limit: int | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009


def rewrite_streamed(
    checkpoint: Checkpoint,
    plan: Plan,
    out: str | Path,
    calls: Calls,
    *,
    named: NamedPlan | None = None,
    fit: ProjectorFit | None = ProjectorFit(),
    overwrite: bool = False,
    report: Notify = silent,
) -> PluggableModel:
    """Do what `rewrite` and `PluggableModel.save` do, with the weights left on disk.

    The graph is rewritten on the meta device. Students are copied from the teacher's files, tensor by tensor; the
    teacher's files are linked into the new folder, or copied where a link is not possible.

    Args:
        checkpoint: the teacher, from `ppcl_fx.model.sources.Source.checkpoint`.
        plan: the edits.
        out: the folder to write; `ppcl_fx.load` reads it.
        calls: recorded calls; the first is what the model is traced with.
        named: where the plan is one of the paper's, that plan: the model must have the blocks that it was made for, and
            it says which students are plugged.
        fit: how projectors are initialised by least squares over the calls; None to let them start as the identity.
        overwrite: replace a folder that exists.
        report: told how far it is.

    Returns:
        The model without weights, plugged as it was saved (every edit, or as `named` says): for its plan and counts.

    Raises:
        PpclError: the plan is for another model, or the disk or the limit is too small.
        Refusal: an edit or a named plan does not fit the model.
    """
    gm = trace(checkpoint.model, calls.examples())
    graph_info(gm)["model"] = checkpoint.fingerprint
    if named is not None:
        named.check(gm)
    model = _pluggable(gm, plan)
    graph = model.graph
    model.plug(students=model.edits if named is None else named.students(model))
    replaces = owned.STUDENT if overwrite else None
    with new_folder(out, replaces=replaces, reads=[checkpoint.shards.folder]) as beside:
        model.save_head(beside)
        copied = _place_teacher(checkpoint.shards, beside / TEACHER)
        need_room(beside, form_bytes(student_forms(graph)) + sum(path.stat().st_size for path, _ in copied))
        for source, target in copied:
            with new_file(target) as whole:
                shutil.copyfile(source, whole)
        fitted: Mapping[str, Tensor] = {}
        scratch = beside / "scratch"
        if fit is not None:
            scratch.mkdir()
            room = 2**62 if fit.memory_limit is None else state_budget(graph, calls, (), fit.memory_limit)
            values = Spill(scratch, room, fit.device)
            residency = Residency(fit.device, _reader(graph, checkpoint), values, checkpoint.shards.close)
            fitted = fit_on_disk(graph, (c.kwargs for c in calls), len(calls), residency, scratch, report)
        write_students(graph, checkpoint, beside / STUDENTS, fitted, report)
        shutil.rmtree(scratch, ignore_errors=True)
    return model


def write_students(
    graph: GraphModule, checkpoint: Checkpoint, path: Path, fitted: Mapping[str, Tensor], report: Notify = silent
) -> None:
    """Write the students' weights: the teacher's own by the mapping of names, and projectors fitted or zero."""
    forms = student_forms(graph)
    read, total, done = _reader(graph, checkpoint), form_bytes(forms), 0

    def tensor(name: str) -> Tensor:
        if not name.startswith("projectors."):
            return read(name)
        dtype, shape = forms[name]
        return fitted[name].to(dtype) if name in fitted else torch.zeros(shape, dtype=dtype)

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        checkpoint.shards.close()  # or every file stays mapped to the end
        report(done >> 20, total >> 20, "writing students, MiB")

    try:
        write_long(path, forms, tensor, tick, digests=True)
    finally:
        checkpoint.shards.close()


def _reader(graph: GraphModule, checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """Return what gives the tensors of a pluggable graph by name: a student's are those of the block it began as."""
    teachers = {new: old for old, new in graph_info(graph).get("names", {}).items() if new.startswith("students.")}
    return lambda name: checkpoint.tensor(teachers.get(name, name))


def _place_teacher(shards: Shards, folder: Path) -> list[tuple[Path, Path]]:
    """Link the teacher's files into a folder and write their index; return what could not be linked, with its place."""
    left = []
    for file in shards.files:
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            left.append((file, folder / file.name))
    if [file.name for file in shards.files] != [ONE_FILE]:
        size = sum(entry.nbytes for entry in shards.stored.values())
        weight_map = {name: entry.file.name for name, entry in sorted(shards.stored.items())}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return left
