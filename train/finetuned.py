"""A fine-tuned model on disk: one mixture's weights, beside the pluggable model whose structure it shares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.files import new_folder, read_json, read_safetensors, write_json, write_safetensors
from ppcl_fx.plan import plan_digest as plan_digest
from ppcl_fx.train.stages import mixture

if TYPE_CHECKING:
    from ppcl_fx.model import PluggableModel

WEIGHTS = "model.safetensors"
CARD = "finetuned.json"


class Card(BaseModel):
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
    card = Card(
        plan=plan_digest(model.plan), students=students, params=params, keep=params / model.teacher_params
    )
    with new_folder(folder, overwrite=True) as beside:
        write_safetensors(beside / WEIGHTS, {name: p.to(model.dtype) for name, p in gm.named_parameters()})
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
    card = read_json(folder / CARD, Card)
    if card.plan != plan_digest(model.plan):
        raise PpclError(
            f"{folder}: fine-tuned from another plan or model; give the pluggable model it stands beside"
        )
    gm = copy.deepcopy(mixture(model, card.students)).requires_grad_(False)
    tensors = read_safetensors(folder / WEIGHTS)
    parameters = dict(gm.named_parameters())
    if tensors.keys() != parameters.keys() or any(tensors[n].shape != p.shape for n, p in parameters.items()):
        raise PpclError(f"{folder / WEIGHTS}: does not fit the model's parameters; fine-tune again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return gm
