"""LoRA on a pluggable model, by the teacher's block numbers.

The changes are *fused*: each weight becomes ``W + strength * alpha / rank * B A``, written into the parameter's own
memory, and the weight as it was is kept in host memory, so that unloading gives it back to the bit. Fused rather than
kept beside the weights as PEFT's layers are, for three reasons. The passes that make a mixture look at exact
`torch.nn.Linear` layers and cut views out of their weights (`ppcl_fx.passes.lowering.narrow`, `expand`): with plain
weights every mixture is right without their knowing of LoRA. Attention modules stay whole in the graph, where no node
could carry a second path. And a mixture runs, trains, exports and counts as if there were no adapter. What it costs:
host memory for the weights that are changed, and the rounding of a fused weight in 16 bits, as with diffusers' own
``fuse_lora``. PEFT's own layers read and merge them (`ppcl_fx.lora.layers`), so a fused teacher is the same to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.lora.keys import Lora
from ppcl_fx.lora.layers import Layer, attach, merged, misfits
from ppcl_fx.passes.edits.depth import student_path
from ppcl_fx.schema.plan import DepthEdit, Plan

log = logging.getLogger("ppcl_fx.lora")

PARTS = ("students", "projectors")
"""What stands in the teacher's place in a pluggable graph."""


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA's layers in a mixture. Every layer is counted once.

    Attributes:
        adapter: its name.
        layers: layers in the file.
        kept: go to parts of the teacher that the mixture holds.
        students: go to student blocks, which stand for the teacher's.
        removed: belong to blocks that the mixture does not hold; dropped.
        projectors: belong to parts that a linear projector replaces; dropped.
    """

    adapter: str
    layers: int
    kept: int
    students: int
    removed: int
    projectors: int

    def __str__(self) -> str:
        return (
            f"LoRA {self.adapter!r}: of {self.layers} layers {self.kept} go to the teacher's parts and {self.students} "
            f"to student blocks; dropped are {self.removed} of removed blocks and {self.projectors} of parts that "
            "projectors replace"
        )


@dataclass(frozen=True)
class Adapter:
    """One loaded LoRA.

    Attributes:
        layers: teacher's module path -> its change.
        on_students: whether student blocks take the layers of the block that they started from.
        strength: the weight given to `Adapters.activate`.
    """

    layers: dict[str, Layer]
    on_students: bool = True
    strength: float = 1.0


@dataclass
class Adapters:
    """The LoRAs of a pluggable graph.

    Args:
        graph: the pluggable graph; its parameters are changed in place.
        plan: its plan, which says which student stands for which blocks.
    """

    graph: GraphModule
    plan: Plan
    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    fused: bool = False
    scale: float = 1.0
    _modules: frozenset[str] = field(init=False)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _written: dict[str, tuple[int, int]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._modules = frozenset(path for path, _ in self.graph.named_modules())

    # ---- loading -----------------------------------------------------------------------------------------------

    def load(self, name: str, lora: Lora, on_students: bool = True, swap: bool = False) -> None:
        """Add a LoRA and make it the active one, as diffusers does.

        Args:
            name: its name.
            lora: what was read.
            on_students: whether student blocks take the layers of the block that they started from.
            swap: put it in the place of the one of that name.

        Raises:
            PpclError: the name is taken, or the LoRA is for another model; nothing is changed then.
        """
        if swap:
            self._known(name)
        elif name in self.loaded:
            raise PpclError(f"a LoRA named {name!r} is loaded already; choose another name, or delete it first")
        own = {path: module for path, module in self.graph.named_modules() if path.split(".")[0] not in PARTS}
        why = misfits(lora, own)
        if why:
            raise PpclError(f"the LoRA {name!r} is for another model: {why}; give one that was trained on this teacher")
        if any(parameter.is_meta for parameter in self.graph.parameters()):
            raise PpclError("the weights are on the meta device, offloaded one by one; load the LoRA before offloading")
        adapter = Adapter(attach(lora, own, f"lora_{next(self._numbers)}"), on_students)
        with self.change():
            self.loaded[name], self.active = adapter, [name]

    def activate(self, names: Sequence[str], strengths: Sequence[float]) -> None:
        """Choose which LoRAs count, in which order they are added, and how strongly.

        Raises:
            PpclError: a name is unknown, or weights would not be finite; nothing is changed then.
        """
        for name in names:
            self._known(name)
        with self.change():
            self.active = list(names)
            for name, strength in zip(names, strengths, strict=True):
                self.loaded[name] = replace(self.loaded[name], strength=strength)

    def delete(self, names: Sequence[str]) -> None:
        """Forget LoRAs; weights that no other one changes are again what they were, to the bit."""
        for name in names:
            self._known(name)
        with self.change():
            for name in names:
                self.loaded.pop(name, None)
            self.active = [name for name in self.active if name in self.loaded]

    def unload(self) -> None:
        """Forget every LoRA. The weights are what they were, to the bit; where they were fused they stay so."""
        self.check_untouched()
        if self.fused:
            self._kept.clear()
            self._written.clear()
        self.loaded.clear()
        self.active.clear()
        self.fused, self.enabled, self.scale = False, True, 1.0
        self.refresh()

    # ---- weights -----------------------------------------------------------------------------------------------

    @contextmanager
    def change(self) -> Iterator[None]:
        """Change what counts and how strongly, then write the weights; all of it is as before where that fails.

        Raises:
            PpclError: somebody else has changed the weights, or PEFT cannot merge.
        """
        self.check_untouched()
        before = dict(self.loaded), self.active, self.enabled, self.scale
        yield
        try:
            self.refresh()
        except PpclError:
            self.loaded, self.active, self.enabled, self.scale = before
            self.refresh()
            raise

    def refresh(self) -> None:
        """Write every weight anew: the kept one plus the active changes, in their order.

        Raises:
            PpclError: PEFT cannot merge a change.
        """
        wanted, parameters = self._changes(), dict(self.graph.named_parameters())
        changed = {path: {name for layer, _ in changes for name in layer.changes} for path, changes in wanted.items()}
        names = {f"{path}.{name}" for path, own in changed.items() for name in own}
        with torch.no_grad():
            for name in names - self._kept.keys():
                self._kept[name] = parameters[name].detach().to("cpu", copy=True)
            for name in self._kept.keys() - names:
                parameters[name].copy_(self._kept[name])
            for path, changes in wanted.items():
                module = self.graph.get_submodule(path)
                kept = {
                    name: self._kept.get(f"{path}.{name}", tensor).to(tensor.device, copy=True)
                    for name, tensor in module.named_parameters(recurse=False)
                }
                result = merged(module, kept, changes)
                for name in changed[path]:
                    # In place: layers that `Narrow` cut are views of this memory.
                    parameters[f"{path}.{name}"].copy_(result[name])
        for name in list(self._kept):
            if name in names or self.fused:
                self._written[name] = _state(parameters[name])
            else:
                del self._kept[name]
                self._written.pop(name, None)

    def moved(self, graph: GraphModule) -> None:
        """Follow a move to another device or dtype: the kept weights take the dtype, the changes are added in it."""
        self.graph = graph
        self._modules = frozenset(path for path, _ in graph.named_modules())
        if not self._kept:
            return
        parameters = dict(graph.named_parameters())
        self._kept = {path: kept.to(parameters[path].dtype) for path, kept in self._kept.items()}
        self.refresh()

    def original(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of a state dict as it is without any LoRA."""
        return self._kept.get(path, tensor)

    def _changes(self) -> dict[str, list[tuple[Layer, float]]]:
        """Return, for each module's path, what changes it and how strongly."""
        changes: dict[str, list[tuple[Layer, float]]] = {}
        for name in self.active if self.enabled else []:
            adapter = self.loaded[name]
            for path, layer in adapter.layers.items():
                for target in self._targets(path, adapter):
                    changes.setdefault(target, []).append((layer, adapter.strength * self.scale))
        return changes

    def _targets(self, path: str, adapter: Adapter) -> Iterator[str]:
        yield path
        for edit in self.plan.depth() if adapter.on_students else []:
            source, student = _source(edit), student_path(edit)
            target = student + path[len(source) :]
            if path.startswith(f"{source}.") and target in self._modules:
                yield target

    def check_untouched(self) -> None:
        """Raise where somebody else (training, loading weights) has changed a weight that a LoRA is fused into."""
        if not self._written:
            return
        parameters = dict(self.graph.named_parameters())
        for path, state in self._written.items():
            if _state(parameters[path]) != state:
                raise PpclError(
                    f"{path} was changed while a LoRA was loaded, so the weights without it are not known any more; "
                    "load the model again, and unload a LoRA before training"
                )

    def _known(self, name: str) -> None:
        if name not in self.loaded:
            have = ", ".join(self.loaded) or "none"
            raise PpclError(f"no LoRA named {name!r} is loaded{near(name, self.loaded)}; loaded are {have}")

    # ---- counting ----------------------------------------------------------------------------------------------

    def report(self, name: str, mixture: nn.Module, students: Sequence[str]) -> LoraReport:
        """Say what becomes of a LoRA's layers in a mixture.

        Args:
            name: the LoRA.
            mixture: the mixture's graph module, without what it does not use.
            students: the edits that are plugged in it.
        """
        self._known(name)
        adapter = self.loaded[name]
        there = {path for path, _ in mixture.named_modules()}
        counts = {"kept": 0, "students": 0, "removed": 0, "projectors": 0}
        replaced = [edit for edit in self.plan.depth() if edit.id in students]
        for path in adapter.layers:
            targets = [target for target in self._targets(path, adapter) if target in there]
            if path in targets:
                counts["kept"] += 1
            elif targets:
                counts["students"] += 1
            else:
                counts["removed" if self._is_removed(path, replaced, adapter) else "projectors"] += 1
        return LoraReport(name, len(adapter.layers), **counts)

    @staticmethod
    def _is_removed(path: str, replaced: Sequence[DepthEdit], adapter: Adapter) -> bool:
        for edit in replaced:
            if any(path.startswith(f"{edit.stack}.{index}.") for index in range(edit.first, edit.last + 1)):
                # What would go to the student, but is missing in it, has been replaced by a projector there.
                return not (adapter.on_students and path.startswith(f"{_source(edit)}."))
        return False


def _source(edit: DepthEdit) -> str:
    """Return the path of the block that a student started from."""
    index = (edit.first + edit.last) // 2 if edit.init == "middle" else edit.first
    return f"{edit.stack}.{index}"


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Return what changes when somebody writes into a parameter or puts another in its place."""
    return id(parameter), 0 if parameter.is_inference() else parameter._version


def strengths(names: Sequence[str], weights: Any) -> list[float]:
    """Turn what diffusers' ``set_adapters`` takes into one number a name.

    Raises:
        PpclError: another number of weights than names, or a weight that is no number.
    """
    given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(given) != len(names):
        raise PpclError(f"{len(names)} LoRAs and {len(given)} weights; give one weight for each")
    plain = [1.0 if weight is None else weight for weight in given]
    for name, weight in zip(names, plain, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise PpclError(f"the weight of LoRA {name!r} is {weight!r}; give one number for the whole transformer")
    return [float(weight) for weight in plain]
