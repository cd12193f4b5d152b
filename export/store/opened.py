"""A model that is to be exported, in memory or not, and what can be checked of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.store.weight_source import WeightSource
from ppcl_fx.io.byte_ranges import byte_ranges
from ppcl_fx.io.long_files import form_bytes
from ppcl_fx.io.memory import size_words
from ppcl_fx.io.shards import Shards
from ppcl_fx.model.finetuned import FinetunedFolder
from ppcl_fx.model.pluggable import PluggableModel, load
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.schema.measured_effects import EFFECTS, load_effects

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

    @classmethod
    def of(cls, model: PluggableModel | StudentFolder | FinetunedFolder, config: ExportConfig) -> Opened:
        """Take a model from memory, or from a folder: loaded where checking it stays within the limit of memory.

        Raises:
            PpclError: a file of the folder is damaged, or they do not fit each other.
        """
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

    places = byte_ranges(tuned.file)
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
    held = form_bytes(weights.forms(None))
    compared = form_bytes(weights.forms(torch.float32))
    same = held == compared and config.torch_dtype in (None, torch.float32)
    needed = COPIES * compared if same else held + COPIES * compared
    if needed <= config.memory_limit:
        return None
    words = size_words(needed)
    return f"not checked against PyTorch: the weights were not read ({words} and more with --memory-limit checks)"
