"""Pruned models that others load: which blocks of the teacher are left and their numbers; the file ``pruned.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue

from ppcl_fx._version import __version__
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, new_folder, write_json, write_safetensors
from ppcl_fx.io.shards import ONE_FILE
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.passes.edits.depth import student_path
from ppcl_fx.schema.plan import DepthEdit, Plan

PRUNED = "pruned.json"


@dataclass(frozen=True)
class Kept:
    """A block that is left: the numbers of the first and last of the teacher's blocks that it stands for."""

    index: int
    last: int
    path: str
    """In the graph: ``transformer_blocks.7`` or ``students.transformer_blocks_3_5``."""


def kept_blocks(blocks: Sequence[str], depth: Sequence[DepthEdit]) -> dict[str, list[Kept]]:
    """Return what plugged depth edits leave of the teacher's blocks, by block list: places are the new numbers."""
    starts = {f"{edit.stack}.{edit.first}": edit for edit in depth}
    gone = {f"{edit.stack}.{index}" for edit in depth for index in range(edit.first + 1, edit.last + 1)}
    found: dict[str, list[Kept]] = {}
    for path in (path for path in blocks if path not in gone):
        stack, _, number = path.rpartition(".")
        edit = starts.get(path)
        kept = Kept(int(number), int(number), path) if edit is None else Kept(edit.first, edit.last, student_path(edit))
        found.setdefault(stack, []).append(kept)
    return found


def originals(kept: Mapping[str, Sequence[Kept]]) -> dict[str, str]:
    """Return module path in the pruned model -> module path in the graph, of the blocks that are left."""
    return {f"{stack}.{place}": block.path for stack, blocks in kept.items() for place, block in enumerate(blocks)}


def renumbered(blocks: Sequence[str], kept: Mapping[str, Sequence[Kept]]) -> dict[str, str]:
    """Return module path in the graph -> module path in the pruned model, of every block.

    One that is not left gets a path that no model has, so that it is not taken for the block that has its number now.
    """
    return {**{path: f"removed.{path}" for path in blocks}, **{path: new for new, path in originals(kept).items()}}


def translated(name: str, paths: Mapping[str, str]) -> str:
    """Return a parameter's (or module's) name with the longest of the module paths in front of it replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        front = ".".join(parts[:end])
        if front in paths:
            return ".".join([paths[front], *parts[end:]])
    return name


class Pruned(Record):
    """Where a pruned model comes from, and how many parameters it has.

    Attributes:
        plan: the edits that it has, in the teacher's block numbers.
        kept: block list -> the teacher's number of each block that is left; of a run that was replaced, the first.
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
    model: PluggableModel,
    kept: dict[str, list[Kept]],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    overwrite: bool,
) -> Path:
    """Write the folder of the mixture that is plugged now, beside its name and renamed; return it."""
    info = graph_info(model.graph)
    facts = Pruned(
        plan=plugged_plan(model),
        kept={stack: [block.index for block in blocks] for stack, blocks in kept.items()},
        params=model.param_count(),
        example=info["example"],
        made={"version": __version__, "passes": info.get("passes", [])},
    )
    with new_folder(folder, replaces=owned.PRUNED if overwrite else None) as beside:
        write_json(beside / "config.json", config)
        write_json(beside / PRUNED, facts)
        write_safetensors(beside / ONE_FILE, tensors, {"format": "pt"}, digests=True)
    return folder


def plugged_plan(model: PluggableModel) -> Plan:
    """Return the plan of the edits that are plugged now, with the parameters that they leave."""
    edits = [edit for edit in model.plan.edits if edit.id in model.students]
    return model.plan.model_copy(update={"edits": edits, "params": model.param_count()})
