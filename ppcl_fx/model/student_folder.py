"""Saved models with their weights on disk: a pluggable one, under the students that are trained so far, and beside it a
fine-tuned one, a mixture's weights, whose structure is the pluggable model's.
"""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import (
    inside,
    need_room,
    new_file,
    new_folder,
    read_json,
    read_safetensors,
    sha256_of,
    write_json,
    write_safetensors,
)
from ppcl_fx.io.shards import Shards, check_kind, form_bytes, write_long
from ppcl_fx.ir.dtypes import set_dtypes
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.pluggable import (
    CARD,
    FINETUNED,
    STUDENTS,
    PluggableModel,
    check_students,
    open_head,
    open_teacher,
    student_forms,
)
from ppcl_fx.model.retrace import insert_edits
from ppcl_fx.passes.calibration.memory_estimate import elements
from ppcl_fx.schema.curves import StageCurves
from ppcl_fx.schema.plan import plan_digest
from ppcl_fx.tracing import trace_saved
from ppcl_fx.tracing.meta_model import Checkpoint

WEIGHTS = "model.safetensors"
NAME = "finetuned"
"""What its folder's name begins with: ``finetuned``, or ``finetuned-0.7`` for a share."""

_log = logging.getLogger("ppcl_fx.train")


class Finished(BaseModel):
    """What lies beside a finished student's tensors: their file's digest, the losses, and why an edit ended early."""

    model_config = ConfigDict(extra="forbid")
    sha256: str
    curves: StageCurves


@dataclass
class StudentFolder:
    """A student folder whose weights are read when they are needed.

    Attributes:
        folder: where it is.
        model: the pluggable model; its parameters are on the meta device.
        teacher: the teacher's weights.
        students: the students' weights as they were saved.
        traced_size: elements of the tensors of the call that the model was traced with.
        trained: tensors that lie over them, by name.
    """

    folder: Path
    model: PluggableModel
    teacher: Checkpoint
    students: Shards
    traced_size: int
    trained: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, teacher: Checkpoint | None = None) -> StudentFolder:
        """Open what `PluggableModel.save` or `rewrite_streamed` wrote; no weight is read.

        `teacher` has the teacher's weights where they are not those in the folder.
        """
        folder = Path(folder)
        card, plan, students = open_head(folder)
        if teacher is None:
            source, dtype = open_teacher(folder, card, plan)
            teacher = source.checkpoint(dtype)
            set_dtypes(teacher.model, card.teacher_dtypes())
        example = build_call(card.example, where=str(folder / CARD))
        gm = trace_saved(teacher.model, example, folder / CARD)
        graph_info(gm)["model"] = plan.model
        model = PluggableModel(insert_edits(gm, plan), plan)
        check_students(folder, students, model.graph)
        return cls(folder, model, teacher, students, elements(example))

    def read(self, name: str) -> Tensor:
        """Return a tensor of the pluggable graph by name: trained, saved, or the teacher's; memory-mapped."""
        if name in self.trained:
            return self.trained[name]
        if name in self.students.stored:
            return self.students.checked(name)
        return self.teacher.tensor(name)

    def release(self) -> None:
        self.teacher.shards.close()
        self.students.close()

    def save(self) -> None:
        """Replace the students' file by one with the trained tensors in it: written beside, synced, renamed."""
        forms = student_forms(self.model.graph)
        need_room(self.folder, form_bytes(forms))
        try:
            with new_file(self.folder / STUDENTS) as beside:
                write_long(beside, forms, self.read, lambda _: self.release(), digests=True)
        finally:
            self.release()
        self.students = Shards.one_file(self.folder / STUDENTS)
        self.trained.clear()


def save_finished(folder: Path, name: str, tensors: Mapping[str, Tensor], curves: StageCurves) -> None:
    """Write a finished student; the JSON file comes last, and without it the student is not finished."""
    path = folder / f"{name}.safetensors"
    write_safetensors(path, tensors)
    write_json(folder / f"{name}.json", Finished(sha256=sha256_of(path), curves=curves))


def load_finished(folder: Path, name: str) -> tuple[dict[str, Tensor], Finished] | None:
    """Return a finished student, memory-mapped; None where it is not finished, or damaged (with a warning)."""
    path, card = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not card.is_file():
        return None
    try:
        found = read_json(card, Finished)
        tensors = read_safetensors(path)
        if sha256_of(path) == found.sha256:
            return tensors, found
        _log.warning("%s: its checksum is another than when it was written; this student is trained again", path)
    except PpclError as error:
        _log.warning("damaged student passed over, it is trained again: %s", error)
    return None


class FinetunedManifest(BaseModel):
    """What a fine-tuned folder holds: the digest of the plan that its mixture was cut by, the edits in the mixture, its
    number of parameters, and its share of the teacher's.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    plan: str
    students: list[str]
    params: int = Field(gt=0)
    keep: float = Field(gt=0)


def save_finetuned(gm: GraphModule, model: PluggableModel, students: list[str], folder: Path) -> None:
    """Write the fine-tuned graph of the mixture `students` of `model` to `folder`, replacing what is there."""
    params = sum(p.numel() for p in gm.parameters())
    dtypes = {name: p.dtype for name, p in mixture(model, students).named_parameters()}
    card = FinetunedManifest(
        plan=plan_digest(model.plan), students=students, params=params, keep=params / model.teacher_params
    )
    with new_folder(folder, replaces=owned.FINETUNED) as beside:
        tensors = {name: p.to(dtypes[name]) for name, p in gm.named_parameters()}
        write_safetensors(beside / WEIGHTS, tensors, digests=True)
        write_json(beside / FINETUNED, card)


def load_finetuned(model: PluggableModel, folder: str | Path) -> GraphModule:
    """Return the fine-tuned model in a folder that `train` wrote as a plain graph, with weights of its own.

    Of the pluggable model that it was fine-tuned from, only the structure is used.
    """
    _, graph, weights = _opened(Path(folder), model, "; give the pluggable model it stands beside")
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            parameter.copy_(weights.checked(name))
    return graph


def _opened(folder: Path, model: PluggableModel, advice: str) -> tuple[FinetunedManifest, GraphModule, Shards]:
    """Return what a folder says, its mixture of `model` with parameters of its own, and the weights for them."""
    card = read_json(inside(folder, FINETUNED), FinetunedManifest)
    if card.plan != plan_digest(model.plan):
        raise PpclError(f"{folder}: fine-tuned from another plan or model{advice}")
    graph = copy.deepcopy(mixture(model, card.students)).requires_grad_(False)
    weights = Shards.one_file(inside(folder, WEIGHTS))
    if weights.shapes != {name: tuple(parameter.shape) for name, parameter in graph.named_parameters()}:
        raise PpclError(f"{folder / WEIGHTS}: does not fit the model's parameters; fine-tune again")
    for name, entry in weights.stored.items():
        check_kind(entry.dtype, graph.get_parameter(name), name, entry.file)
    return card, graph, weights


@dataclass
class FinetunedFolder:
    """A fine-tuned model with its weights left on disk.

    Attributes:
        student: The folder of the pluggable model that it stands beside.
        model: That model, with its parameters on the meta device.
        graph: The fine-tuned mixture, with parameters of its own, on the meta device.
        file: Its weights, by the names of the graph's parameters.
        students: The edits in it.
        keep: Its share of the teacher's parameters.
    """

    student: Path
    model: PluggableModel
    graph: GraphModule
    file: Path
    students: Sequence[str]
    keep: float

    @classmethod
    def open(cls, folder: str | Path) -> FinetunedFolder:
        """Open what `save_finetuned` wrote, in the folder of its pluggable model; no weight is read."""
        folder = Path(folder)
        student = folder.absolute().parent
        if not (folder / FINETUNED).is_file():
            known = [path.parent.name for path in student.glob(f"{NAME}*/{FINETUNED}")]
            share = folder.name.removeprefix(NAME).removeprefix("-")
            more = f" --keep {shlex.quote(share)}" if share else ""
            raise PpclError(
                f"{folder}: holds no fine-tuned model{near(folder.name, known)}; make it with: "
                f"ppcl-fx train {shlex.quote(str(student))} --calls CALLS --stage finetune --steps 100{more}"
            )
        if not (student / CARD).is_file():
            raise PpclError(
                f"{folder}: a fine-tuned model, and {student} is not the pluggable model that it was made from; "
                "put it back into that folder"
            )
        model = StudentFolder.open(student).model
        card, graph, _ = _opened(folder, model, f" than {student} holds now; fine-tune again")
        return cls(student, model, graph, inside(folder, WEIGHTS), card.students, card.keep)


def is_finetuned(folder: Path) -> bool:
    """Tell whether a folder holds a fine-tuned model, or is where `train` would write one."""
    named = folder.name.startswith(NAME) and (folder.absolute().parent / CARD).is_file()
    return (folder / FINETUNED).is_file() or (named and not (folder / CARD).is_file())
