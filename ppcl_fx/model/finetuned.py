"""A fine-tuned model on disk: one mixture's weights, beside the pluggable model whose structure it shares."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import (
    inside,
    new_folder,
    read_json,
    read_safetensors,
    tensor_shapes,
    write_json,
    write_safetensors,
)
from ppcl_fx.io.shards import Shards, check_kind, check_weight
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.pluggable import CARD as STUDENT_CARD
from ppcl_fx.model.pluggable import FINETUNED as CARD
from ppcl_fx.schema.plan import plan_digest as plan_digest

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel

WEIGHTS = "model.safetensors"
NAME = "finetuned"
"""What its folder's name begins with: ``finetuned``, or ``finetuned-0.7`` for a share."""


class FinetunedManifest(BaseModel):
    """What a fine-tuned folder holds.

    Attributes:
        plan: Digest of the plan that the mixture was cut by (`plan_digest`).
        students: The edits in the mixture.
        params: Its number of parameters.
        keep: Its share of the teacher's parameters.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    plan: str
    students: list[str]
    params: int = Field(gt=0)
    keep: float = Field(gt=0)


def save_finetuned(gm: GraphModule, model: PluggableModel, students: list[str], folder: Path) -> None:
    """Write the fine-tuned graph `gm` of the mixture `students` of `model` to `folder`, replacing what is
    there.
    """
    params = sum(p.numel() for p in gm.parameters())
    dtypes = {name: p.dtype for name, p in mixture(model, students).named_parameters()}
    card = FinetunedManifest(
        plan=plan_digest(model.plan), students=students, params=params, keep=params / model.teacher_params
    )
    with new_folder(folder, replaces=owned.FINETUNED) as beside:
        tensors = {name: p.to(dtypes[name]) for name, p in gm.named_parameters()}
        write_safetensors(beside / WEIGHTS, tensors, digests=True)
        write_json(beside / CARD, card)


def load_finetuned(model: PluggableModel, folder: str | Path) -> GraphModule:
    """Return the fine-tuned model in `folder` as a plain graph, with weights of its own; `model` is left as
    it is.

    Args:
        model: The pluggable model that it was fine-tuned from; only its structure is used.
        folder: What `train` wrote ("finetuned", "finetuned-0.7").

    Raises:
        PpclError: The folder is missing or damaged, or belongs to another plan.
    """
    folder = Path(folder)
    card = read_json(inside(folder, CARD), FinetunedManifest)
    if card.plan != plan_digest(model.plan):
        raise PpclError(f"{folder}: fine-tuned from another plan or model; give the pluggable model it stands beside")
    gm = copy.deepcopy(mixture(model, card.students)).requires_grad_(False)
    tensors = read_safetensors(inside(folder, WEIGHTS))
    parameters = dict(gm.named_parameters())
    if tensors.keys() != parameters.keys() or any(tensors[n].shape != p.shape for n, p in parameters.items()):
        raise PpclError(f"{folder / WEIGHTS}: does not fit the model's parameters; fine-tune again")
    for name, tensor in tensors.items():
        check_kind(tensor.dtype, parameters[name], name, folder / WEIGHTS)
        check_weight(tensor, name, folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    graph_info(gm)["mixture"] = (model.plan, card.students)  # for calls of other kinds
    return gm


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
        """Open what `save_finetuned` wrote, in the folder of its pluggable model; no weight is read.

        Raises:
            PpclError: A file is missing, damaged, or does not fit the others.
        """
        from ppcl_fx.model.student_folder import StudentFolder

        folder = Path(folder)
        student = folder.absolute().parent
        if not (folder / CARD).is_file():
            _missing(folder, student)
        card = read_json(inside(folder, CARD), FinetunedManifest)
        if not (student / STUDENT_CARD).is_file():
            raise PpclError(
                f"{folder}: a fine-tuned model, and {student} is not the pluggable model that it was made from; "
                "put it back into that folder"
            )
        opened = StudentFolder.open(student)
        if card.plan != plan_digest(opened.model.plan):
            raise PpclError(
                f"{folder}: fine-tuned from another plan or model than {student} holds now; fine-tune again"
            )
        graph = copy.deepcopy(mixture(opened.model, card.students)).requires_grad_(False)
        file = inside(folder, WEIGHTS)
        wanted = {name: tuple(parameter.shape) for name, parameter in graph.named_parameters()}
        if {name: shape for name, (_, shape) in tensor_shapes(file).items()} != wanted:
            raise PpclError(f"{file}: does not fit the model's parameters; fine-tune again")
        for name, entry in Shards.one_file(file).stored.items():
            check_kind(entry.dtype, graph.get_parameter(name), name, file)
        return cls(student, opened.model, graph, file, card.students, card.keep)


def is_finetuned(folder: Path) -> bool:
    """Tell whether a folder holds a fine-tuned model, or is where `train` would write one."""
    named = folder.name.startswith(NAME) and (folder.absolute().parent / STUDENT_CARD).is_file()
    return (folder / CARD).is_file() or (named and not (folder / STUDENT_CARD).is_file())


def _missing(folder: Path, student: Path) -> NoReturn:
    known = [path.parent.name for path in student.glob(f"{NAME}*/{CARD}")]
    share = folder.name.removeprefix(NAME).removeprefix("-")
    more = f" --keep {shlex.quote(share)}" if share else ""
    raise PpclError(
        f"{folder}: holds no fine-tuned model{near(folder.name, known)}; make it with: "
        f"ppcl-fx train {shlex.quote(str(student))} --calls CALLS --stage finetune --steps 100{more}"
    )
