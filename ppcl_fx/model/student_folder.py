"""A saved pluggable model with its weights left on disk, and the students that are trained so far laid over them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import (
    inside,
    need_room,
    read_json,
    read_safetensors,
    sha256_of,
    write_json,
    write_safetensors,
)
from ppcl_fx.io.shards import Form, Shards, check_kind, form_bytes, write_long
from ppcl_fx.ir.dtypes import set_dtypes
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import (
    CARD,
    PLAN,
    STUDENTS,
    TEACHER,
    PluggableModel,
    StudentManifest,
    check_teacher,
    saved_dtype,
)
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.streamed_rewrite import student_forms
from ppcl_fx.passes.calibration.memory_estimate import elements
from ppcl_fx.schema.curves import StageCurves
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace_saved
from ppcl_fx.tracing.meta_model import Checkpoint

_log = logging.getLogger("ppcl_fx.train")


class Finished(BaseModel):
    """What lies beside a finished student's tensors.

    Attributes:
        sha256: of the tensors' file.
        curves: the losses, one value a step, the held-out losses, and why an edit ended before its last step.
    """

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

        Args:
            folder: the folder.
            teacher: the teacher's weights where they are not those in the folder.

        Raises:
            PpclError: a file is missing, damaged, or does not fit the others.
        """
        folder = Path(folder)
        card = read_json(inside(folder, CARD), StudentManifest)
        plan = read_json(inside(folder, PLAN), Plan)
        students = Shards.one_file(inside(folder, STUDENTS))
        if teacher is None:
            source = open_source(str(inside(folder, TEACHER)))
            check_teacher(folder, source.checkpoint(), card, plan)
            teacher = source.checkpoint(dtype=saved_dtype(folder, card))
            set_dtypes(teacher.model, card.teacher_dtypes())
        example = build_call(card.example, where=str(folder / CARD))
        gm = trace_saved(teacher.model, example, folder / CARD)
        graph_info(gm)["model"] = plan.model
        model = PluggableModel(insert_edits(gm, plan), plan)
        made = cls(folder, model, teacher, students, elements(example))
        made._check(student_forms(model.graph))
        return made

    def read(self, name: str) -> Tensor:
        """Return a tensor of the pluggable graph by name: trained, saved, or the teacher's; memory-mapped.

        Raises:
            KeyError: no file holds it.
        """
        if name in self.trained:
            return self.trained[name]
        if name in self.students.stored:
            return self.students.checked(name)
        return self.teacher.tensor(name)

    def release(self) -> None:
        """Let go of the files."""
        self.teacher.shards.close()
        self.students.close()

    def save(self) -> None:
        """Replace the students' file by one with the trained tensors in it: written beside, synced, renamed.

        Raises:
            PpclError: the disk is full, or the place cannot be written.
        """
        forms = student_forms(self.model.graph)
        need_room(self.folder, form_bytes(forms))
        beside = self.folder / f".{STUDENTS}.partial"
        try:
            write_long(beside, forms, self.read, lambda _: self.release(), digests=True)
            os.replace(beside, self.folder / STUDENTS)
        finally:
            beside.unlink(missing_ok=True)
            self.release()
        self.students = Shards.one_file(self.folder / STUDENTS)
        self.trained.clear()

    def _check(self, wanted: Mapping[str, Form]) -> None:
        """The students' file has the plan's tensors and no others."""
        path = self.folder / STUDENTS
        for name, (dtype, shape) in wanted.items():
            if name not in self.students.stored or self.students.stored[name].shape != shape:
                raise PpclError(f"{path} does not fit the plan: {name} is missing or of another shape; save again")
            check_kind(self.students.stored[name].dtype, torch.empty(0, dtype=dtype), name, path)
        extra = sorted(set(self.students.stored) - set(wanted))
        if extra:
            raise PpclError(f"{path} does not fit the plan: it holds {extra[0]}, which no edit has; save again")


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
