"""The released layout as data: three lists of block numbers in ``config.json``, and what each block then holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.formats.pruned import Kept, renumbered
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.files import inside, read_json
from ppcl_fx.io.shards import Shards, check_kind
from ppcl_fx.ir.dtypes import kept_in_float32
from ppcl_fx.model.sources import RELEASED_LISTS, transformer_class
from ppcl_fx.passes.edits.ffn import projector_path
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing.meta_model import skeleton as weightless

STACK = "transformer_blocks"
LISTS = RELEASED_LISTS
WHOLE = 16
"""How much larger a model of whole blocks may be than what is left of it."""

Index = Annotated[int, Field(ge=0, strict=True)]


class Layout(BaseModel):
    """A ``config.json`` of the released layout; block numbers count the `num_layers` blocks that are left.

    Attributes:
        single_stream_index: blocks without a text stream.
        ffn_proj_index: blocks whose feed-forwards are projectors, in every stream that they have.
        ehs_proj_index: blocks without a text stream that hold their group's projector of the text state.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    num_layers: Annotated[int, Field(ge=1, strict=True)]
    single_stream_index: list[Index] = Field(default_factory=list)
    ffn_proj_index: list[Index] = Field(default_factory=list)
    ehs_proj_index: list[Index] = Field(default_factory=list)

    @property
    def config(self) -> dict[str, JsonValue]:
        """The configuration of the model's class: everything but the three lists."""
        return {**self.__pydantic_extra__, "num_layers": self.num_layers}

    def groups(self) -> list[tuple[int, int]]:
        """Return the runs of blocks without a text stream as ``(source, last)``; the source has one still."""
        found: list[tuple[int, int]] = []
        for index in sorted(self.single_stream_index):
            if found and found[-1][1] == index - 1:
                found[-1] = (found[-1][0], index)
            else:
                found.append((index - 1, index))
        return found

    def edits(self) -> list[Edit]:
        """Return what the lists say as edits of a model with `num_layers` blocks."""
        return [
            *(TextStreamEdit(stack=STACK, source=source, last=last) for source, last in self.groups()),
            *(FfnEdit(stack=STACK, block=block) for block in sorted(self.ffn_proj_index)),
        ]

    def check(self, where: str) -> None:
        """Raise `PpclError` where the lists contradict each other."""
        for fault in self._faults():
            raise PpclError(f"{where}: {fault}")

    def _faults(self) -> Iterator[str]:
        for name in LISTS:
            values: list[int] = getattr(self, name)
            yield from (f"{name} has {v} twice; mend the list" for v in sorted(set(values)) if values.count(v) > 1)
            beyond = f"and num_layers is {self.num_layers}; mend the list"
            yield from (f"{name} has block {v}, {beyond}" for v in values if v >= self.num_layers)
        if 0 in self.single_stream_index:
            yield "single_stream_index has block 0, and no block before it has a text stream; mend the list"
        for block in self.ehs_proj_index:
            if block not in self.single_stream_index:
                yield f"ehs_proj_index has block {block}, which single_stream_index does not have; mend one"
        for source, last in self.groups():
            held = [block for block in self.ehs_proj_index if source < block <= last]
            if len(held) > 1:
                yield (
                    f"ehs_proj_index has {held[0]} and {held[1]}, both in the group of blocks {source + 1} to {last}, "
                    "and a group has one such projector; mend the list"
                )


def expected(model: nn.Module, layout: Layout) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return name -> shape of the tensors that a checkpoint must have, and of those that it may have.

    A block without a text stream has ``attn`` whole (its ``to_add_out`` is there and not used) and no ``txt_*``. A
    block whose feed-forwards are projectors has the first half of each modulation, the attention's. `model` is the
    class with `layout.num_layers` whole blocks; only shapes are looked at.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    width = shapes.get(f"{STACK}.0.img_mod.1.weight", (0, 0))[-1]
    if not width or f"{STACK}.0.txt_mod.1.weight" not in shapes:
        why = f"{type(model).__name__} has no {STACK} with img_mod and txt_mod, so there is no released layout for it"
        raise PpclError(f"{why}; save the pluggable model itself")
    single, ffn = set(layout.single_stream_index), set(layout.ffn_proj_index)
    must: dict[str, tuple[int, ...]] = {}
    may: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        block, part = _place(name)
        if block in ffn and part in ("img_mod", "txt_mod"):
            shape = (shape[0] // 2, *shape[1:])
        gone = (block in single and part.startswith("txt_")) or (block in ffn and part in ("img_mlp", "txt_mlp"))
        unused = block in single and name.startswith(f"{STACK}.{block}.attn.to_add_out.")
        if not gone:
            (may if unused else must)[name] = shape
    holders = layout.ehs_proj_index
    projectors = {"img_ffn_proj": ffn, "txt_ffn_proj": ffn - single, "txt_proj": single, "ehs_proj": holders}
    for part, blocks in projectors.items():
        for path in (f"{STACK}.{block}.{part}" for block in blocks):
            must |= {f"{path}.weight": (width, width), f"{path}.bias": (width,)}
    return must, may


def open_layout(folder: Path, dtype: torch.dtype | None = None) -> tuple[Layout, nn.Module]:
    """Read and check all of a checkpoint but its tensors; return the lists and the model without weights."""
    path = inside(folder, "config.json")
    layout = read_json(path, Layout)
    layout.check(str(path))
    kind = transformer_class(path)
    weights = Shards.open(folder)
    room = Room.of(weights.shapes, times=WHOLE)
    stored = weights.dtype(kept_in_float32(kind))
    skeleton = weightless(kind, layout.config, dtype or stored, room=room, where=str(path))
    if len(getattr(skeleton, STACK, ())) != layout.num_layers:
        raise PpclError(f"{path}: {kind.__name__} has no {STACK} that num_layers counts; not of the released layout")
    compare(weights, skeleton, layout)
    return layout, skeleton


def compare(weights: Shards, model: nn.Module, layout: Layout) -> None:
    """Raise `PpclError` where the weights are not those that the lists say."""
    must, may = expected(model, layout)
    have, known = weights.shapes, must | may
    missing = sorted(must.keys() - have.keys(), key=_order)
    extra = sorted(have.keys() - known.keys(), key=_order)
    both = sorted(known.keys() & have.keys(), key=_order)
    faults = [
        *(f"{_some(names)} {what}" for names, what in ((missing, "missing"), (extra, "too much")) if names),
        *(f"{name} is {list(have[name])} and not {list(known[name])}" for name in both if have[name] != known[name]),
    ]
    if faults:
        advice = "mend the lists of config.json, or copy the folder again"
        raise PpclError(f"{weights.folder}: the lists disagree with the weights: {faults[0]}; {advice}")
    for name in both:
        check_kind(weights.stored[name].dtype, torch.empty(0), name, weights.stored[name].file)


def graph_paths(blocks: Sequence[str], plan: Plan, kept: Sequence[Kept], layout: Layout) -> dict[str, str]:
    """Return module path in a pluggable graph -> module path in the released layout.

    `blocks` are the block paths of the teacher, in whose block numbers the plugged edits of `plan` are; `kept` are
    those that are left, in order, and `layout` has the lists for them.
    """
    number = {block.index: place for place, block in enumerate(kept)}
    paths = renumbered(blocks, {STACK: kept})
    # Nothing reads the text state within a group, so wherever in it its projector lies, the group's end sees it.
    groups, held = layout.groups(), layout.ehs_proj_index
    holder = {last: block for source, last in groups for block in held if source < block <= last}
    for edit in plan.edits:
        if isinstance(edit, FfnEdit):
            for stream, prefix in (("image", "img"), ("text", "txt")):
                paths[projector_path(edit.id, stream)] = f"{STACK}.{number[edit.block]}.{prefix}_ffn_proj"
        elif isinstance(edit, TextStreamEdit):
            inside = {b.path.replace(".", "_"): number[b.index] for b in kept if edit.source < b.index <= edit.last}
            paths |= {projector_path(edit.id, f"{key}.z"): f"{STACK}.{at}.txt_proj" for key, at in inside.items()}
            key, at = list(inside.items())[-1]
            paths[projector_path(edit.id, f"{key}.state")] = f"{STACK}.{holder.get(at, at)}.ehs_proj"
    return paths


def layout_of(plan: Plan, kept: Sequence[Kept], config: Mapping[str, JsonValue]) -> Layout:
    """Return the layout of a mixture: the plugged edits of `plan` on the blocks that are left."""
    number = {block.index: place for place, block in enumerate(kept)}
    texts = [edit for edit in plan.edits if isinstance(edit, TextStreamEdit)]
    groups = [[number[block.index] for block in kept if t.source < block.index <= t.last] for t in texts]
    return Layout.model_validate(
        {
            **config,
            "num_layers": len(kept),
            "single_stream_index": sorted(itertools.chain(*groups)),
            "ffn_proj_index": sorted(number[edit.block] for edit in plan.edits if isinstance(edit, FfnEdit)),
            "ehs_proj_index": sorted(inside[-1] for inside in groups),
        }
    )


def teacher_plan(layout: Layout, kept: Sequence[int], blocks: int) -> Plan:
    """Return a layout's edits in the teacher's block numbers, of which there are `blocks`.

    PpclError where those of the blocks that are left, `kept`, do not rise from 0, or are not as many as the blocks.
    """
    if len(kept) != layout.num_layers:
        why = f"{len(kept)} of the teacher's blocks are said to be kept, and the checkpoint has {layout.num_layers}"
        raise PpclError(f"{why}; give one number for each")
    if kept[0] != 0 or kept[-1] >= blocks or list(kept) != sorted(set(kept)):
        why = f"the kept blocks {list(kept)} do not rise from 0 to at most {blocks - 1}"
        raise PpclError(f"{why}; the first block of each run that was replaced is the kept one")
    ends = [*(after - 1 for after in kept[1:]), blocks - 1]
    edits: list[Edit] = [
        DepthEdit(stack=STACK, first=first, last=last) for first, last in zip(kept, ends, strict=True) if last > first
    ]
    edits += (TextStreamEdit(stack=STACK, source=kept[first], last=ends[last]) for first, last in layout.groups())
    edits += (FfnEdit(stack=STACK, block=kept[block]) for block in sorted(layout.ffn_proj_index))
    return Plan(edits=edits)


def _place(name: str) -> tuple[int, str]:
    """Return the block number and the part of a parameter's name; -1 outside of the blocks."""
    parts = name.split(".")
    if len(parts) > 3 and parts[0] == STACK and parts[1].isdecimal():
        return int(parts[1]), parts[2]
    return -1, ""


def _order(name: str) -> tuple[int, str]:
    return _place(name)[0], name


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
