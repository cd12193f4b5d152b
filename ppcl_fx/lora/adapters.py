"""LoRA on a pluggable model, by the teacher's block numbers.

The changes are *fused*: each weight becomes ``W + strength * alpha / rank * B A``, written into the parameter's own
memory, and the weight as it was is kept in host memory, so that unloading gives it back to the bit. They are not kept
beside the weights as PEFT does, because passes look at exact `torch.nn.Linear` layers and cut views out of their
weights (`ppcl_fx.passes.lowering.narrow`), because attention modules stay whole in the graph, where no node could carry
a second path, and because a mixture then runs, trains, exports and counts as if there were no adapter. It costs host
memory for the weights that are changed, and the rounding of a fused weight in 16 bits. PEFT's own layers read and merge
them (`ppcl_fx.lora.layers`), so a teacher fused by diffusers is the same to the bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.lora.keys import Lora
from ppcl_fx.lora.layers import Layer, attach, merged, misfits
from ppcl_fx.passes.edits.depth import student_path
from ppcl_fx.schema.plan import DepthEdit, Plan

log = logging.getLogger("ppcl_fx.lora")


@dataclass(frozen=True)
class LoraReport:
    """What became of a LoRA's layers in a mixture. Every layer is counted once.

    Attributes:
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
    """One loaded LoRA: its changes by the teacher's module path, whether students take them, and how strongly."""

    layers: dict[str, Layer]
    on_students: bool = True
    strength: float = 1.0


@dataclass
class Adapters:
    """The LoRAs of a pluggable graph, whose parameters are changed in place; its plan says who stands for what."""

    graph: GraphModule
    plan: Plan
    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    fused: bool = False
    scale: float = 1.0
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _written: dict[str, tuple[int, int]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def load(self, name: str, lora: Lora, on_students: bool = True, swap: bool = False) -> None:
        """Add a LoRA and make it the active one; `swap` puts it in the place of that name's. All or nothing."""
        if swap:
            self.check_known(name)
        elif name in self.loaded:
            raise PpclError(f"a LoRA named {name!r} is loaded already; choose another name, or delete it first")
        mine = ("students.", "projectors.")  # what stands in the teacher's place
        own = {path: module for path, module in self.graph.named_modules() if not path.startswith(mine)}
        why = misfits(lora, own)
        if why:
            raise PpclError(f"the LoRA {name!r} is for another model: {why}; give one that was trained on this teacher")
        if any(parameter.is_meta for parameter in self.graph.parameters()):
            raise PpclError("the weights are on the meta device, offloaded one by one; load the LoRA before offloading")
        adapter = Adapter(attach(lora, own, f"lora_{next(self._numbers)}"), on_students)
        with self.change():
            self.loaded[name], self.active = adapter, [name]

    def unload(self) -> None:
        self.check_untouched()
        if self.fused:
            self._kept, self._written = {}, {}
        self.loaded, self.active = {}, []
        self.fused, self.enabled, self.scale = False, True, 1.0
        self.refresh()

    def check_known(self, *names: str) -> None:
        """Raise `PpclError` where no LoRA of such a name is loaded."""
        for name in names:
            if name not in self.loaded:
                have = ", ".join(self.loaded) or "none"
                raise PpclError(f"no LoRA named {name!r} is loaded{near(name, self.loaded)}; loaded are {have}")

    @contextmanager
    def change(self) -> Iterator[None]:
        """Change what counts and how strongly, then write the weights; all of it is as before where that is refused."""
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
        """Write every weight anew: the kept one plus the active changes, in their order."""
        wanted, parameters = self._changes(), dict(self.graph.named_parameters())
        names = {f"{path}.{name}" for path, own in wanted.items() for layer, _ in own for name in layer.changes}
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
                for name, tensor in merged(module, kept, changes).items():
                    if f"{path}.{name}" in names:
                        # In place: layers that `Narrow` cut are views of this memory.
                        parameters[f"{path}.{name}"].copy_(tensor)
        if not self.fused:
            self._kept = {name: kept for name, kept in self._kept.items() if name in names}
        self._written = {name: _state(parameters[name]) for name in self._kept}

    def moved(self, graph: GraphModule) -> None:
        """Follow a move to another device or dtype: the kept weights take the dtype, the changes are added in it."""
        self.graph = graph
        if self._kept:
            parameters = dict(graph.named_parameters())
            self._kept = {path: kept.to(parameters[path].dtype) for path, kept in self._kept.items()}
            self.refresh()

    def _changes(self) -> dict[str, list[tuple[Layer, float]]]:
        """Return, for each module's path, what changes it and how strongly."""
        changes: dict[str, list[tuple[Layer, float]]] = {}
        there = {path for path, _ in self.graph.named_modules()}
        for name in self.active if self.enabled else []:
            adapter = self.loaded[name]
            for path, layer in adapter.layers.items():
                for target in self._targets(path, adapter, there):
                    changes.setdefault(target, []).append((layer, adapter.strength * self.scale))
        return changes

    def _targets(self, path: str, adapter: Adapter, there: set[str]) -> list[str]:
        """Return which of the modules that are there a layer changes: the teacher's own, and those of students."""
        places = [path]
        for edit in self.plan.depth() if adapter.on_students else []:
            if path.startswith(f"{_source(edit)}."):
                places.append(student_path(edit) + path.removeprefix(_source(edit)))
        return [place for place in places if place in there]

    def check_untouched(self) -> None:
        """Raise where somebody else (training, loading weights) has changed a weight that a LoRA is fused into."""
        parameters = dict(self.graph.named_parameters()) if self._written else {}
        for path, state in self._written.items():
            if _state(parameters[path]) != state:
                raise PpclError(
                    f"{path} was changed while a LoRA was loaded, so the weights without it are not known any more; "
                    "load the model again, and unload a LoRA before training"
                )

    def report(self, name: str, mixture: nn.Module, students: Sequence[str]) -> LoraReport:
        """Say what becomes of a LoRA's layers in the graph module of a mixture, in which `students` are plugged."""
        self.check_known(name)
        adapter = self.loaded[name]
        replaced = [edit for edit in self.plan.depth() if edit.id in students]
        there, counts = {path for path, _ in mixture.named_modules()}, Counter[str]()
        for path in adapter.layers:
            targets = self._targets(path, adapter, there)
            edit = next((edit for edit in replaced if _covers(edit, path)), None)
            if targets:
                counts["kept" if path in targets else "students"] += 1
            # What would go to the student, but is missing in it, has been replaced by a projector there.
            elif edit is None or (adapter.on_students and path.startswith(f"{_source(edit)}.")):
                counts["projectors"] += 1
            else:
                counts["removed"] += 1
        kinds = ("kept", "students", "removed", "projectors")
        return LoraReport(name, len(adapter.layers), *(counts[kind] for kind in kinds))


def _covers(edit: DepthEdit, path: str) -> bool:
    return any(path.startswith(f"{edit.stack}.{index}.") for index in range(edit.first, edit.last + 1))


def _source(edit: DepthEdit) -> str:
    """Return the path of the block that a student started from."""
    index = (edit.first + edit.last) // 2 if edit.init == "middle" else edit.first
    return f"{edit.stack}.{index}"


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Return what changes when somebody writes into a parameter or puts another in its place."""
    return id(parameter), 0 if parameter.is_inference() else parameter._version
