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
    """Return the blocks that depth edits leave, by block list, in order: their places are their new numbers.

    Args:
        blocks: the teacher's block paths.
        depth: the depth edits that are plugged.
    """
    starts = {f"{edit.stack}.{edit.first}": edit for edit in depth}
    gone = {f"{edit.stack}.{index}" for edit in depth for index in range(edit.first + 1, edit.last + 1)}
    found: dict[str, list[Kept]] = {}
    for path in blocks:
        stack, _, number = path.rpartition(".")
        edit = starts.get(path)
        if edit is not None:
            found.setdefault(stack, []).append(Kept(edit.first, edit.last, student_path(edit)))
        elif path not in gone:
            found.setdefault(stack, []).append(Kept(int(number), int(number), path))
    return found


def renumbered(blocks: Sequence[str], kept: Mapping[str, Sequence[Kept]]) -> dict[str, str]:
    """Return module path in the graph -> module path in the pruned model, of every block.

    A block that is not left gets a path that no model has: what a model reads of it from elsewhere must not be taken
    for the block that has its number now.
    """
    left = {block.path: f"{stack}.{number}" for stack, own in kept.items() for number, block in enumerate(own)}
    return {**{path: f"removed.{path}" for path in blocks}, **left}


def translated(name: str, paths: Mapping[str, str]) -> str:
    """Return a parameter's (or module's) name with the longest of the module paths in front of it replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        front = ".".join(parts[:end])
        if front in paths:
            return ".".join([paths[front], *parts[end:]])
    return name
