"""Writing a mixture in the released layout."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError
from ppcl_fx.formats.layout import LISTS, STACK, Layout, expected, graph_paths, layout_of
from ppcl_fx.formats.numbering import Kept, kept_blocks, originals, translated
from ppcl_fx.formats.pruned import plugged_plan, pruned, write_pruned
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing.meta_model import skeleton as weightless


def save_released(model: PluggableModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the mixture that is plugged now in the released layout.

    Args:
        model: the model; its teacher must be of a class with the layout's parts (see `ppcl_fx.formats.layout`).
        folder: where to; written beside and renamed.
        overwrite: replace a folder that exists.

    Raises:
        PpclError: the mixture does not fit the layout, or the folder cannot be written.
    """
    info = graph_info(model.graph)
    plan = _effective(model, plugged_plan(model))
    _check(model, plan)
    kept = kept_blocks(info["blocks"], plan.depth())
    layout = layout_of(plan, kept[STACK], info["config"])
    tensors = _tensors(model, plan, kept[STACK], layout)
    config = {
        "_class_name": info["config"]["_class_name"],
        "_ppcl_fx_version": __version__,
        **layout.config,
        **{name: getattr(layout, name) for name in LISTS},
    }
    return write_pruned(Path(folder), config, tensors, pruned(model, kept), overwrite)


def _effective(model: PluggableModel, plan: Plan) -> Plan:
    """Return a plan without the feed-forward edits of students that are not plugged themselves: they do nothing."""
    waiting = {(edit.stack, edit.first) for edit in _waiting(model)}
    edits = [e for e in plan.edits if not (isinstance(e, FfnEdit) and (e.stack, e.block) in waiting)]
    return plan.model_copy(update={"edits": edits})


def _waiting(model: PluggableModel) -> list[DepthEdit]:
    return [edit for edit in model.plan.depth() if edit.id not in model.students]


def _check(model: PluggableModel, plan: Plan) -> None:
    """Refuse what the three lists cannot say."""
    config = graph_info(model.graph).get("config", {})
    if not config.get("_class_name"):
        raise PpclError("the teacher has no diffusers configuration, so there is no released layout for it")
    lists = sorted({path.rpartition(".")[0] for path in graph_info(model.graph)["blocks"]})
    if lists != [STACK] or "num_layers" not in config:
        raise PpclError(
            f"the released layout knows one list of blocks, {STACK}, and this model has {', '.join(lists)}; "
            "save the pluggable model, or depth edits alone for diffusers"
        )
    for text in (edit for edit in plan.edits if isinstance(edit, TextStreamEdit)):
        for depth in _waiting(model):
            if text.source < depth.first <= text.last:
                raise PpclError(
                    f"{text.id} is plugged and {depth.id} inside of it is not: those blocks keep their text stream, "
                    "which the released layout cannot say; plug both or neither"
                )


def _tensors(model: PluggableModel, plan: Plan, kept: list[Kept], layout: Layout) -> dict[str, torch.Tensor]:
    paths = graph_paths(graph_info(model.graph)["blocks"], plan, kept, layout)
    found = {translated(name, paths): tensor for name, tensor in model.graph_module().state_dict().items()}
    skeleton = weightless(diffusers_class(str(layout.config["_class_name"])), layout.config, model.dtype)
    must, may = expected(skeleton, layout)
    # The layout keeps what a block without a text stream has and does not use.
    whole, back = model.graph.state_dict(), originals({STACK: kept})
    found |= {name: whole[source] for name in may if (source := translated(name, back)) in whole}
    for name, shape in must.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise PpclError(f"this mixture does not fit the released layout: {name} is missing or of another shape")
    return {name: found[name] for name in sorted({*must, *may} & set(found))}
