"""One problem while it trains: its weights in memory, its optimiser, its checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ppcl_fx.graphs import copy_graph_module
from ppcl_fx.train import checkpoints, schedule
from ppcl_fx.train.bounded.folder import save_finished
from ppcl_fx.train.bounded.options import BoundedOptions
from ppcl_fx.train.bounded.problems import Problem, tensor_place
from ppcl_fx.train.checkpoints import Identity
from ppcl_fx.train.curves import StageCurves
from ppcl_fx.train.executor import Distiller
from ppcl_fx.train.losses import Weights
from ppcl_fx.train.masters import Masters
from ppcl_fx.train.stages import outline_students

Part = tuple[float, Callable[[], Sequence[Any]]]
"""A call of a batch: its share of the batch, and what gives the border's values."""


class Student:
    """A problem with its weights in memory, from its beginning or from its last checkpoint.

    Args:
        problem: the problem; its parameters are on the meta device and are again after `release`.
        stage: "depth" or "width".
        total: steps in all.
        read: gives weights by name.
        options: of the run.
        identity: what its checkpoints belong to.
        folder: for its checkpoints.
        device: where it trains.

    Attributes:
        done: steps that are done.
        stopped: why it trains no further; empty while it does.

    Raises:
        PpclError: no checkpoint in the folder is whole, or it belongs to another run.
    """

    def __init__(
        self,
        problem: Problem,
        stage: str,
        total: int,
        read: Callable[[str], Tensor],
        options: BoundedOptions,
        identity: Identity,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.problem, self.done, self.stopped = problem, 0, ""
        self._total, self._options, self._identity, self._folder = total, options, identity, folder
        self._curves = StageCurves(name=stage, label=stage)
        graph = copy_graph_module(problem.graph)
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: dict[str, Parameter] = {}
        """What trains, by its name in the students' file."""
        for name in problem.trained:
            self.tensors[name] = self._place(graph, name, read, device, trains=True)
        for name in problem.frozen:
            self._place(graph, name, read, device, trains=False)
        if options.checkpointing and stage == "depth":
            outline_students(graph)
        self._distiller = Distiller(
            graph,
            Weights(**options.weights.model_dump()),
            checkpointing=options.checkpointing,
            autocast=options.cast,
        )
        self._masters = Masters(self._distiller.groups)
        self._optimizer = schedule.optimizer(self._masters.groups, options.lr)
        self._resume()

    def step(self, batch: Sequence[Part]) -> float:
        """Do one step on the calls of a batch, one after the other, and return the sum of the edits' losses.

        A loss or gradient that is NaN or infinite stops the student: the update is not done, and `stopped` names the
        step and the edit.
        """
        began = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.lr * schedule.factor(self.done, self._total)
        self._optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        for share, border in batch:
            for edit, loss in self._distiller.step_on(border(), share).items():
                losses[edit] = losses.get(edit, 0.0) + share * loss
            self._masters.take_gradients()
        norms = schedule.clip(self._masters.groups, self._options.clip)
        numbers = {edit: float(loss) for edit, loss in losses.items()}
        for what, values in (("loss", numbers), ("gradient norm", {e: float(n) for e, n in norms.items()})):
            for edit, value in values.items():
                if not math.isfinite(value):
                    self.stopped = f"step {self.done + 1}: the {what} of {edit} is {value}"
                    self._optimizer.zero_grad(set_to_none=True)
                    return math.nan
        self._optimizer.step()
        self._masters.write_back()
        self._optimizer.zero_grad(set_to_none=True)
        self._curves.append(numbers)
        self._curves.seconds += time.perf_counter() - began
        self.done += 1
        return sum(numbers.values())

    def checkpoint(self) -> None:
        """Write a checkpoint, unless it has stopped."""
        if self.stopped:
            return
        tensors = {f"students.{name}": p.detach() for name, p in self.tensors.items()}
        tensors |= self._masters.tensors() | checkpoints.optimizer_state(self._optimizer)
        checkpoints.save(self._folder, self._identity, 0, self.done, [self._curves], tensors)

    def finish(self, folder: Path, name: str) -> None:
        """Write what came out, and remove the checkpoints."""
        tensors = {name: p.detach() for name, p in self.tensors.items()}
        save_finished(folder, name, tensors, self._curves, self.stopped)
        shutil.rmtree(self._folder, ignore_errors=True)

    def release(self) -> None:
        """Put the weightless parameters back.

        Students may share a frozen module, so those of a group are released in the reverse order of their making.
        """
        for table, leaf, own in reversed(self._places):
            table[leaf] = own
        self._places.clear()
        self.tensors.clear()

    def _place(
        self,
        graph: nn.Module,
        name: str,
        read: Callable[[str], Tensor],
        device: torch.device,
        *,
        trains: bool,
    ) -> Any:
        table, leaf = tensor_place(graph, name)
        own = table[leaf]
        try:
            tensor = read(name).to(own.dtype)
        except KeyError:
            if own.is_meta:
                raise RuntimeError(f"no file holds {name}") from None
            tensor = own.detach()
        # What trains is copied, or the update would go to a page of the file.
        tensor = tensor.to(device, copy=trains)
        self._places.append((table, leaf, own))
        table[leaf] = Parameter(tensor, requires_grad=trains) if isinstance(own, Parameter) else tensor
        return table[leaf]

    def _resume(self) -> None:
        found = checkpoints.latest(self._folder, self._identity)
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(found.tensors[f"students.{name}"])
        self._masters.load(found.tensors)
        checkpoints.load_optimizer_state(self._optimizer, found.tensors)
        self._curves = found.state.curves[0].model_copy(deep=True)
        self.done = found.state.step
