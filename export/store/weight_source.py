"""A model that is to be exported: its weights by name, in memory or on disk, and which of them a mixture's are."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.export.config import ExportConfig
from ppcl_fx.io.memory import size_words
from ppcl_fx.io.shards import Form, Shards, Stored, form_bytes, stored_tensors
from ppcl_fx.model.pluggable import PluggableModel, load
from ppcl_fx.model.retrace import is_constant, is_mixture
from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.lowering.narrow import rows_of
from ppcl_fx.passes.quantisation.quantise import Quantised
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme
from ppcl_fx.schema.measured_effects import EFFECTS, load_effects


@dataclass(frozen=True)
class WeightPiece:
    """A run of elements of one tensor of a source, from its element `first` on: all of it, or some of its rows."""

    name: str
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """Where the weights of a model are.

    The state dict of `root` has the names; its tensors may be on the meta device. `read` gives a tensor, and `release`
    lets go of open files. A model that is in memory alone has no ranges and no folder. `typed` is the graph of `root`
    as the model is in another type, whose dtypes the weights are to have. Weights that are `quantised` are stored under
    two names, `values_name` and `scales_name`, and not under their own.
    """

    root: GraphModule
    read: Callable[[str], Tensor]
    release: Callable[[], None] = lambda: None
    ranges: Mapping[str, Stored] = field(default_factory=dict)
    folder: Path | None = None
    typed: GraphModule | None = None
    quantised: Quantised | None = None

    @classmethod
    def memory(cls, root: GraphModule, typed: GraphModule | None = None) -> WeightSource:
        """Return the weights of a module that is in memory."""
        return cls(root, root.state_dict().__getitem__, typed=typed)

    @classmethod
    def files(cls, opened: StudentFolder, root: GraphModule) -> WeightSource:
        """Return the weights of a student folder, for its pluggable graph, with its weights or without."""
        ranges = {**opened.teacher.shards.stored, **opened.students.stored}
        return cls(root, opened.read, opened.release, ranges, opened.folder)

    def with_quantised(self, quantised: Quantised) -> WeightSource:
        """Return the source with some weights in few bits; all of it is to be stored anew."""
        taken: list[tuple[str, QuantisedWeight]] = []

        def read(name: str) -> Tensor:
            whole, _, _ = name.rpartition("/")
            if whole not in quantised:
                return self.read(name)
            if not taken or taken[0][0] != whole:
                taken[:] = [(whole, quantised[whole])]
            weight = taken[0][1]
            return weight.packed() if name == values_name(whole) else weight.scales.to(quantised.scheme.scale)

        def release() -> None:
            taken.clear()
            self.release()

        return replace(self, read=read, release=release, ranges={}, quantised=quantised)

    def forms(self) -> dict[str, Form]:
        """Return the dtype that each tensor is stored in, and its shape."""
        wanted = self.root.state_dict() if self.typed is None else self.typed.state_dict()
        found: dict[str, Form] = {}
        for name, tensor in self.root.state_dict().items():
            shape = tuple(tensor.shape)
            if self.quantised is not None and name in self.quantised:
                forms = self.quantised.scheme.forms(shape)
                found |= dict(zip(self.stored_as(name), forms, strict=True))
            else:
                found[name] = (wanted[name].dtype if name in wanted else tensor.dtype, shape)
        return found

    def stored_as(self, name: str) -> tuple[str, ...]:
        """Return the names under which a tensor is stored."""
        few = self.quantised is not None and name in self.quantised
        return (values_name(name), scales_name(name)) if few else (name,)

    def in_few_bits(self, pieces: Sequence[WeightPiece]) -> bool:
        """Tell whether the weight of these pieces is in few bits."""
        few = self.quantised
        return few is not None and bool(pieces) and all(piece.name in few for piece in pieces)

    def quantised_inputs(self, pieces: Sequence[WeightPiece]) -> tuple[Scheme, float] | None:
        """Return how the inputs of the weight of these pieces are stored, and their scale; None where they are not."""
        if self.quantised is None or not self.in_few_bits(pieces) or pieces[0].name not in self.quantised.inputs:
            return None
        return self.quantised.scheme, self.quantised.inputs[pieces[0].name]

    def quantised_pieces(self, pieces: Sequence[WeightPiece]) -> list[QuantisedWeight] | None:
        """Return the rows that the pieces of a weight are, in few bits; None where the weight stays as it is."""
        if not self.in_few_bits(pieces):
            return None
        assert self.quantised is not None
        return [self.quantised[piece.name].rows(*rows_in(piece)) for piece in pieces]

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
            if self.typed is not None and is_constant(path):
                continue  # another trace has others
            parts = [_piece(part, homes) for part in rows_of(tensor)]
            if all(parts):
                found[path] = tuple(part for part in parts if part is not None)
        return found


def values_name(name: str) -> str:
    """Return what the packed values of a weight are called where it is stored in few bits."""
    return f"{name}/values"


def scales_name(name: str) -> str:
    """Return what its scales are called."""
    return f"{name}/scales"


def rows_in(piece: WeightPiece) -> tuple[int, int]:
    """Return the first row and the number of rows of a piece of a weight ``[rows, columns]``."""
    rows, columns = piece.shape
    assert piece.first % columns == 0, piece
    return piece.first // columns, rows


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


# ---- a model that is to be exported ----------------------------------------------------------------------------

COPIES = 3
"""How often the weights are in memory for a check: PyTorch's, onnxruntime's, and those it transposed. Half precision is
compared in float32, so all three are."""


def stays_on_disk(model: PluggableModel | StudentFolder, config: ExportConfig) -> bool:
    """Tell whether a model, in memory or a student folder, is too large to be loaded for the checks of an export."""
    if isinstance(model, PluggableModel):
        return False
    return _unread(WeightSource.files(model, model.model.graph), config) is not None


@dataclass(frozen=True)
class Opened:
    """A pluggable model, with its weights or without; where they are; and why graphs cannot be compared to PyTorch."""

    model: PluggableModel
    weights: WeightSource
    unchecked: str | None

    def typed(self, graph: GraphModule | None) -> Opened:
        """Return the same, with weights that are wanted in the dtypes of a graph, None for their own."""
        return replace(self, weights=replace(self.weights, typed=graph))

    def in_type(self, students: Sequence[str]) -> GraphModule | None:
        """Return a mixture in the type that the weights are wanted in, without weights; None where that is its own."""
        graph = self.weights.typed
        return graph if graph is None or is_mixture(graph) else plugged(graph, frozenset(students))

    @classmethod
    def of(cls, model: PluggableModel | StudentFolder | FinetunedFolder, config: ExportConfig) -> Opened:
        """Take a model from memory, or from a folder: loaded where checking it stays within the limit of memory."""
        if isinstance(model, PluggableModel):
            return cls(model, WeightSource.memory(model.graph), None)
        if isinstance(model, FinetunedFolder):
            return cls(model.model, *_tuned(model, config))
        model.model.eval()  # as a loaded one is: blocks of both are then translated once
        weights = WeightSource.files(model, model.model.graph)
        why = _unread(weights, config)
        if why is None:
            loaded = load(model.folder)
            assert isinstance(loaded, PluggableModel)
            return cls(loaded, WeightSource.files(model, loaded.graph), None)
        if (model.folder / EFFECTS).exists():
            students = {name: model.students.checked(name) for name in model.students.stored}  # memory-mapped
            model.model.effects = load_effects(model.folder, model.model.plan, students)
            model.release()
        return cls(model.model, weights, why)


def _tuned(tuned: FinetunedFolder, config: ExportConfig) -> tuple[WeightSource, str | None]:
    """Return where a fine-tuned model's weights are, and why they were not read into its graph, if so."""
    graph, shards = tuned.graph.eval(), Shards.one_file(tuned.file)
    seen: dict[int, str] = {}
    # A parameter may have several names; the file knows it by the first.
    first = {name: seen.setdefault(id(p), name) for name, p in graph.named_parameters(remove_duplicate=False)}
    dtypes = {name: parameter.dtype for name, parameter in graph.named_parameters()}

    def read(name: str) -> Tensor:
        return shards.checked(first[name]).to(dtypes[first[name]])

    places = stored_tensors(tuned.file)
    ranges = {name: places[first[name]] for name in first}
    weights = WeightSource(graph, read, shards.close, ranges, tuned.student)
    why = _unread(weights, config)
    if why is None:
        own = {name: nn.Parameter(read(name), requires_grad=False) for name in dtypes}
        for name in first:
            parent, _, leaf = name.rpartition(".")
            graph.get_submodule(parent)._parameters[leaf] = own[first[name]]
    return weights, why


def _unread(weights: WeightSource, config: ExportConfig) -> str | None:
    """Return why graphs over weights are not compared to PyTorch; None where that stays within the limit of memory."""
    forms = weights.forms()
    held = form_bytes(forms)
    compared = form_bytes({n: (torch.float32 if d.is_floating_point else d, shape) for n, (d, shape) in forms.items()})
    same = held == compared and config.torch_dtype in (None, torch.float32)
    needed = COPIES * compared if same else held + COPIES * compared
    if needed <= config.memory_limit:
        return None
    words = size_words(needed)
    return f"not checked against PyTorch: the weights were not read ({words} and more with --memory-limit checks)"
