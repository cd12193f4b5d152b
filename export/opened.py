"""A model that is to be exported, in memory or not, and what can be checked of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppcl_fx.effects import EFFECTS, load_effects
from ppcl_fx.export.weight_source import WeightFolder, WeightSource
from ppcl_fx.long_files import form_bytes
from ppcl_fx.memory import size_words
from ppcl_fx.model import PluggableModel, load

MEMORY = 12 * 2**30
"""Bytes that loading a model for the checks may take, if nothing else is said."""

COPIES = 3
"""How often the weights are in memory for a check: PyTorch's, onnxruntime's, and those it transposed. Half precision is
compared in float32, so all three are."""


def stays_on_disk(model: PluggableModel | WeightFolder, limit: int, dtype: torch.dtype | None) -> bool:
    """Tell whether a model is too large to be loaded for the checks, so that nothing will be compared.

    Args:
        model: in memory, or a student folder.
        limit: bytes that the checks may take.
        dtype: the type that it is to be exported in; None for its own.
    """
    if isinstance(model, PluggableModel):
        return False
    return unread(WeightSource.files(model, model.model.graph), dtype, limit) is not None


@dataclass(frozen=True)
class Opened:
    """A model and its weights.

    Attributes:
        model: the pluggable model, with its weights or without.
        weights: where they are.
        unchecked: why graphs cannot be compared to PyTorch; None where they can.
    """

    model: PluggableModel
    weights: WeightSource
    unchecked: str | None

    @classmethod
    def of(cls, model: PluggableModel | WeightFolder, limit: int, dtype: torch.dtype | None = None) -> Opened:
        """Take a model from memory, or a student folder: loaded where checking it stays within a limit in bytes.

        Args:
            model: the model.
            limit: the bytes.
            dtype: the type that it is to be exported in; None for its own.

        Raises:
            PpclError: a file of the folder is damaged, or they do not fit each other.
        """
        if isinstance(model, PluggableModel):
            return cls(model, WeightSource.memory(model.graph), None)
        model.model.eval()  # as a loaded one is: blocks of both are then translated once
        weights = WeightSource.files(model, model.model.graph)
        why = unread(weights, dtype, limit)
        if why is None:
            loaded = load(model.folder)
            assert isinstance(loaded, PluggableModel)
            return cls(loaded, WeightSource.files(model, loaded.graph), None)
        if (model.folder / EFFECTS).exists():
            students = {name: model.students.checked(name) for name in model.students.stored}  # memory-mapped
            model.model.effects = load_effects(model.folder, model.model.plan, students)
            model.release()
        return cls(model.model, weights, why)


def unread(weights: WeightSource, dtype: torch.dtype | None, limit: int) -> str | None:
    """Return why graphs over weights are not compared to PyTorch; None where that stays within a limit in bytes.

    Args:
        weights: the weights.
        dtype: the type that they are to be exported in; None for their own.
        limit: the bytes.
    """
    stored = form_bytes(weights.forms(None))
    compared = form_bytes(weights.forms(torch.float32))
    same = stored == compared and dtype in (None, torch.float32)
    needed = COPIES * compared if same else stored + COPIES * compared
    if needed <= limit:
        return None
    words = size_words(needed)
    return f"not checked against PyTorch: the weights were not read ({words} and more with --memory-limit checks)"
