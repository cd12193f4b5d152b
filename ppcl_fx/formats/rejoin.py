"""Joining a released checkpoint with the teacher that it was pruned from: a pluggable model again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.formats.layout import STACK, Layout, graph_paths, layout_of, open_layout, teacher_plan
from ppcl_fx.formats.pruned import PRUNED, Kept, Pruned, kept_blocks, originals, translated
from ppcl_fx.io.files import inside, read_json
from ppcl_fx.io.shards import Shards
from ppcl_fx.ir.dtypes import kept_in_float32, main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import transformer_folder
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace

SAMPLES = 512
"""Values of each weight that blocks are told apart by."""
MARGIN = 0.5
"""A block is recognised when its weights are this much nearer to one of the teacher's blocks than to all others."""


def with_teacher(
    folder: str | Path,
    teacher: nn.Module,
    example_kwargs: Mapping[str, Any],
    *,
    plan: Plan | None = None,
    kept: Sequence[int] | None = None,
) -> PluggableModel:
    """Plug a released checkpoint's parts into its teacher, every edit switchable, with all of them plugged.

    A checkpoint holds what its own mixture uses. Where a student block lost its feed-forward or its text stream too,
    the block alone, without that second edit, has the teacher's weights there.

    Args:
        folder: the checkpoint.
        teacher: the transformer that it was pruned from, with its weights; what no edit replaced must be its own.
        example_kwargs: the keyword arguments of one call.
        plan: the plan that it was made by, in the teacher's block numbers. Without it and without `kept` the blocks
            are told by their weights.
        kept: instead, the teacher's number of each block that is left: of a run that was replaced, the first.
    """
    folder = transformer_folder(Path(folder))
    if plan is not None and kept is not None:
        raise PpclError("give the plan that a checkpoint was made by, or the blocks that it kept, not both")
    layout, skeleton = open_layout(folder)
    if type(skeleton) is not type(teacher):
        raise PpclError(f"{folder}: of a {type(skeleton).__name__}, and the teacher is a {type(teacher).__name__}")
    tensors = Shards.open(folder).tensors(main_dtype(teacher), kept_in_float32(teacher))
    gm = trace(teacher, example_kwargs)
    blocks = graph_info(gm)["blocks"]
    if plan is None and kept is None and (folder / PRUNED).is_file():
        plan = read_json(inside(folder, PRUNED), Pruned).plan
    if plan is None:
        known = list(kept) if kept is not None else find_kept(folder, tensors, teacher, layout)
        plan = teacher_plan(layout, known, len(blocks))
    left = kept_blocks(blocks, plan.depth()).get(STACK, [])
    _check_plan(folder, plan, left, layout)
    plan = plan.model_copy(update={"model": graph_info(gm)["model"], "teacher_params": 0, "params": 0})
    model = PluggableModel(insert_edits(gm, plan), plan)
    paths = graph_paths(blocks, plan, left, layout)
    _check_teacher(folder, teacher, tensors, left)
    with torch.no_grad():
        for name, parameter in model.students_module.named_parameters():
            tensor = tensors.get(translated(name, paths))
            if tensor is not None:  # else no plugged student uses it
                parameter[: len(tensor)].copy_(tensor)
    return model.plug(students=model.edits).train(teacher.training)


def find_kept(folder: Path, tensors: Mapping[str, torch.Tensor], teacher: nn.Module, layout: Layout) -> list[int]:
    """Return the teacher's number of each block of a checkpoint, told by the weights.

    A block that was not trained has the teacher's weights. A student was trained from the weights of its interval's
    first block, and is still nearer to it than to any other. Where that is not plain, it is a PpclError.
    """
    own = teacher.state_dict()
    count = 1 + max(int(name.split(".")[1]) for name in own if name.startswith(f"{STACK}."))
    found: list[int] = []
    for block in range(layout.num_layers):
        front = f"{STACK}.{block}."
        parts = {name.removeprefix(front): tensor for name, tensor in tensors.items() if name.startswith(front)}
        distances = torch.tensor([_distance(parts, own, f"{STACK}.{index}.") for index in range(count)])
        nearest, ranked = int(distances.argmin()), distances.sort().values
        plain = count == 1 or bool(ranked[0] <= MARGIN * ranked[1])
        if not plain or (nearest <= found[-1] if found else nearest != 0):
            why = f"which of the teacher's blocks block {block} was made from does not show in its weights"
            raise PpclError(f"{folder}: {why}; give the plan, or the teacher's numbers of the blocks that are left")
        found.append(nearest)
    return found


def _distance(parts: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], front: str) -> float:
    """Return how far a block's weights are from those of one of the teacher's blocks, relative to their size."""
    apart = size = 0.0
    for name, tensor in parts.items():
        other = teacher.get(front + name)
        if other is not None and other.shape == tensor.shape:
            one, two = _sample(tensor), _sample(other)
            apart += float((one - two).square().sum())
            size += float(two.square().sum())
    return apart / size if size else float("inf")


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat, count = tensor.detach().reshape(-1), min(SAMPLES, tensor.numel())
    places = torch.arange(count, device=flat.device) * flat.numel() // count
    return flat[places].double().cpu()


def _check_plan(folder: Path, plan: Plan, left: Sequence[Kept], layout: Layout) -> None:
    """Raise `PpclError` where a plan makes other lists than the checkpoint has."""
    if len(left) != layout.num_layers:
        raise PpclError(f"{folder}: has {layout.num_layers} blocks, and the plan leaves {len(left)}; give its own plan")
    made = layout_of(plan, left, {})
    for name in ("single_stream_index", "ffn_proj_index"):
        want, have = sorted(getattr(layout, name)), getattr(made, name)
        if want != have:
            raise PpclError(f"{folder}: {name} is {want}, and the plan makes it {have}; give its own plan")


def _check_teacher(folder: Path, teacher: nn.Module, tensors: Mapping[str, torch.Tensor], left: Sequence[Kept]) -> None:
    """Raise `PpclError` where a part that no edit replaced is not the teacher's."""
    own, back = teacher.state_dict(), originals({STACK: left})
    for name, tensor in tensors.items():
        source = translated(name, back)
        if source not in own or name.endswith(("to_add_out.weight", "to_add_out.bias")):
            continue  # a student's or a projector's, or not used
        if not torch.equal(own[source][: len(tensor)].cpu(), tensor):
            why = "another teacher, another plan, or a checkpoint that was fine-tuned as a whole"
            what = f"{name} is not the teacher's {source}, which no edit replaced"
            raise PpclError(f"{folder}: {what}: {why}; load it alone with ppcl_fx.load")
