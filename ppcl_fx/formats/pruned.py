"""The file ``pruned.json`` beside a pruned model that others load: which plan made it, from which teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue

from ppcl_fx._version import __version__
from ppcl_fx.formats.numbering import Kept
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, new_folder, write_json, write_safetensors
from ppcl_fx.io.shards import ONE_FILE
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.schema.plan import Plan

PRUNED = "pruned.json"


class Pruned(Record):
    """Where a pruned model comes from.

    Attributes:
        plan: the edits that it has, in the teacher's block numbers.
        kept: block list -> the teacher's number of each block that is left; of a run that was replaced, the first.
        params: how many parameters it has.
        example: the arguments of the traced call, as `ppcl_fx.calls.examples.describe` writes them.
        made: the version of this package and the passes that ran.
    """

    version: Literal[1] = 1
    kind: Literal["pruned"] = "pruned"
    plan: Plan
    kept: dict[str, list[int]]
    params: int
    example: dict[str, JsonValue]
    made: dict[str, JsonValue]


def write_pruned(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], facts: Pruned, overwrite: bool
) -> Path:
    """Write a pruned model's folder, beside its name and renamed; return it."""
    with new_folder(folder, replaces=owned.PRUNED if overwrite else None) as beside:
        write_json(beside / "config.json", config)
        write_json(beside / PRUNED, facts)
        write_safetensors(beside / ONE_FILE, tensors, {"format": "pt"}, digests=True)
    return folder


def pruned(model: PluggableModel, kept: dict[str, list[Kept]]) -> Pruned:
    """Describe the mixture that is plugged now."""
    info = graph_info(model.graph)
    return Pruned(
        plan=plugged_plan(model),
        kept={stack: [block.index for block in blocks] for stack, blocks in kept.items()},
        params=model.param_count(),
        example=info["example"],
        made={"version": __version__, "passes": info.get("passes", [])},
    )


def plugged_plan(model: PluggableModel) -> Plan:
    """Return the plan of the edits that are plugged now, with the parameters that they leave."""
    edits = [edit for edit in model.plan.edits if edit.id in model.students]
    return model.plan.model_copy(update={"edits": edits, "params": model.param_count()})
