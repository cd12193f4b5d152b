"""Block numbers after pruning: which blocks of the teacher are left, and what their parts are called then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ppcl_fx.passes.edits.depth import student_path
from ppcl_fx.schema.plan import DepthEdit


@dataclass(frozen=True)
class Kept:
    """A block that is left.

    Attributes:
        index: its number in the teacher; a student has the number of its interval's first block.
        last: the last of the teacher's blocks that it stands for.
        path: its module path in the graph, ``transformer_blocks.7`` or ``students.transformer_blocks_3_5``.
    """

    index: int
    last: int
    path: str


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

    A block that is not left gets a path that no model has: what a model reads of it from elsewhere must not be taken
    for the block that has its number now.
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
