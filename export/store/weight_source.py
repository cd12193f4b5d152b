"""The weights of a model by name, in memory or on disk, and which of them a mixture's parameters are."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl_fx.io.byte_ranges import ByteRange, byte_ranges
from ppcl_fx.io.long_files import Form
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.passes.lowering.narrow import rows_of


@dataclass(frozen=True)
class WeightPiece:
    """A run of elements of one tensor of a source, from its element `first` on: all of it, or some of its rows."""

    name: str
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """Where the weights of a model are.

    Attributes:
        root: the module whose state dict has the names; its tensors may be on the meta device.
        read: gives a tensor by name.
        release: lets go of open files.
        ranges: where each tensor lies on disk; empty for a model that is in memory alone.
        folder: the folder of the files.
    """

    root: nn.Module
    read: Callable[[str], Tensor]
    release: Callable[[], None] = lambda: None
    ranges: Mapping[str, ByteRange] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def memory(cls, root: nn.Module) -> WeightSource:
        """Return the weights of a module that is in memory."""
        return cls(root, root.state_dict().__getitem__)

    @classmethod
    def files(cls, opened: StudentFolder, root: nn.Module) -> WeightSource:
        """Return the weights of a student folder, for its pluggable graph, with its weights or without.

        Raises:
            PpclError: a file is damaged.
        """
        ranges: dict[str, ByteRange] = {}
        for shards in (opened.teacher.shards, opened.students):
            headers = {file: byte_ranges(file) for file in shards.files}
            ranges |= {name: headers[entry.file][entry.name] for name, entry in shards.stored.items()}
        return cls(root, opened.read, opened.release, ranges, opened.folder)

    def forms(self, dtype: torch.dtype | None) -> dict[str, Form]:
        """Return dtype and shape of each tensor, floating-point ones in `dtype` where it is given."""
        return {
            name: (dtype if dtype is not None and t.is_floating_point() else t.dtype, tuple(t.shape))
            for name, t in self.root.state_dict().items()
        }

    def pieces(self, graph: nn.Module) -> dict[str, tuple[WeightPiece, ...]]:
        """Return what each parameter and buffer of a mixture is made of; one that no file holds is left out.

        It goes by the memory that tensors share, on the meta device too: a narrowed layer is a view of some rows, or
        several views put together (`ppcl_fx.passes.lowering.narrow.rows_of`).
        """
        homes: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in self.root.state_dict().items():
            storage, first, last = _span(tensor)
            homes[storage].append((first, last, name))
        for spans in homes.values():
            spans.sort()
        found: dict[str, tuple[WeightPiece, ...]] = {}
        for path, tensor in state(graph).items():
            parts = [_piece(part, homes) for part in rows_of(tensor)]
            if all(parts):
                found[path] = tuple(part for part in parts if part is not None)
        return found


def state(graph: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by every path that it has."""
    return {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }


def weightless(module: nn.Module) -> bool:
    """Tell whether a module has parameters on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Return a tensor's storage, and within that its first byte and the byte after the last."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    return int(tensor.untyped_storage()._cdata), first, first + int(tensor.nbytes)


def _piece(part: Tensor, homes: Mapping[int, list[tuple[int, int, str]]]) -> WeightPiece | None:
    storage, first, last = _span(part)
    spans = homes.get(storage, [])
    at = bisect_right(spans, first, key=lambda span: span[0]) - 1
    while at > 0 and spans[at - 1][0] == spans[at][0]:
        at -= 1  # tensors that share everything: the first by name
    if at < 0 or last > spans[at][1] or not part.is_contiguous():
        return None
    return WeightPiece(spans[at][2], (first - spans[at][0]) // part.element_size(), tuple(part.shape))
