"""One problem while it trains: its weights in memory, its optimiser, its checkpoints."""

from __future__ import annotations

import logging
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
from ppcl_fx.train.average import Average
from ppcl_fx.train.bounded.folder import save_finished
from ppcl_fx.train.bounded.problems import Problem, tensor_place
from ppcl_fx.train.checkpoints import Identity
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.curves import StageCurves, Stop
from ppcl_fx.train.evaluation import converged
from ppcl_fx.train.executor import Distiller, Groups, without_edit
from ppcl_fx.train.masters import Masters
from ppcl_fx.train.stages import outline_students

Part = tuple[float, Callable[[], Sequence[Any]]]
"""A call of a batch: its share of the batch, and what gives the border's values."""
_log = logging.getLogger("ppcl_fx.train")


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
        curves: losses, held-out losses, and why an edit trains no further.

    Raises:
        PpclError: no checkpoint in the folder is whole, or it belongs to another run.
    """

    def __init__(
        self,
        problem: Problem,
        stage: str,
        total: int,
        read: Callable[[str], Tensor],
        options: TrainConfig,
        identity: Identity,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.problem, self.done, self._read = problem, 0, read
        self._total, self._options, self._identity, self._folder = total, options, identity, folder
        self.curves = StageCurves(name=stage, label=stage)
        self._graph = graph = copy_graph_module(problem.graph)
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: dict[str, Parameter] = {}
        """What trains, by its name in the students' file."""
        for name in problem.trained:
            self.tensors[name] = self._place(graph, name, read, device, trains=True)
        for name in problem.frozen:
            self._place(graph, name, read, device, trains=False)
        if options.checkpointing and stage == "depth":
            outline_students(graph)
        self._distiller = self._distil()
        self._active: Groups = self._distiller.groups
        """The edits that still train."""
        self._masters = Masters(self._active)
        self._average = Average(self._masters, options.ema)
        self._optimizer = schedule.optimizer(
            self._masters.groups,
            options.lr,
            kind=options.optimizer,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        self._resume()

    @property
    def over(self) -> bool:
        """Whether nothing is left to train: all steps are done, or every edit has stopped."""
        return self.done >= self._total or not self._active

    def step(self, batches: Sequence[Sequence[Part]]) -> float:
        """Do one step on the calls of its batches, one after the other, and return the sum of the edits' losses.

        A loss or gradient that is NaN or infinite stops the student: the update is not done, and the curves' `stopped`
        names the step and the edit.
        """
        began, options, count = time.perf_counter(), self._options, len(batches)
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * schedule.factor(self.done, self._total, options.warmup)
        self._optimizer.zero_grad(set_to_none=True)
        found: list[dict[str, float]] = []
        for batch in batches:
            losses: dict[str, Tensor] = {}
            for share, border in batch:
                for edit, loss in self._distiller.step_on(border(), share * (1.0 / count)).items():
                    losses[edit] = losses.get(edit, 0.0) + share * loss
                self._masters.take_gradients()
            found.append({edit: float(loss) for edit, loss in losses.items()})
        norms = schedule.clip({edit: self._masters.groups[edit] for edit in self._active}, options.clip)
        lengths = {edit: float(norm) for edit, norm in norms.items()}
        for what, values in (*(("loss", numbers) for numbers in found), ("gradient norm", lengths)):
            for edit, value in values.items():
                if not math.isfinite(value):
                    self._spoilt(f"step {self.done + 1}: the {what} of {edit} is {value}")
                    return math.nan
        self._optimizer.step()
        self._masters.write_back()
        self._average.update(self.done)
        self._optimizer.zero_grad(set_to_none=True)
        means = {edit: sum(numbers[edit] for numbers in found) / count for edit in self._active}
        self.curves.append(means)
        self.curves.seconds += time.perf_counter() - began
        self.done += 1
        return sum(means.values())

    def evaluate(self, batches: Sequence[Sequence[Part]]) -> None:
        """Take down each edit's mean loss on the held-out calls, every batch with the same weight, and stop what has
        converged.
        """
        began, options = time.perf_counter(), self._options
        sums = dict.fromkeys(self._active, 0.0)
        with self._average.shown():
            for batch in batches:
                losses: dict[str, Tensor] = {}
                for share, border in batch:
                    for edit, loss in self._distiller.evaluate_on(border()).items():
                        losses[edit] = losses.get(edit, 0.0) + share * loss
                for edit, loss in losses.items():
                    sums[edit] += float(loss)
        for edit, value in sums.items():
            if math.isfinite(value):
                self.curves.held_out.setdefault(edit, []).append((self.done, value / len(batches)))
        self.curves.seconds += time.perf_counter() - began
        if options.patience is None or self.done >= self._total:
            return
        for edit in list(self._active):
            history = self.curves.held_out.get(edit, [])
            if converged(history, options.patience, options.min_gain):
                self._average.settle(edit)
                reason = f"step {self.done}: held-out loss {history[-1][1]:.4g} has converged"
                self._halt(edit, Stop(step=self.done, kind="converged", reason=reason))

    def checkpoint(self) -> None:
        """Write a checkpoint, unless it is over."""
        self._look_at_weights()
        if self.over:
            return
        tensors = {f"students.{name}": p.detach() for name, p in self.tensors.items()}
        tensors |= self._masters.tensors() | self._average.tensors()
        tensors |= checkpoints.optimizer_state(self._optimizer)
        checkpoints.save(self._folder, self._identity, 0, self.done, [self.curves], tensors)

    def finish(self, folder: Path, name: str) -> None:
        """Write what came out, remove the checkpoints, and keep no more than the weights in memory."""
        self._look_at_weights()
        for edit in self._active:
            self._average.settle(edit)
        tensors = {name: p.detach() for name, p in self.tensors.items()}
        save_finished(folder, name, tensors, self.curves)
        shutil.rmtree(self._folder, ignore_errors=True)
        # The weights stay until `release`: a student beside this one may compute with the same frozen module.
        self._active = {}
        del self._optimizer, self._average, self._masters

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

    def _distil(self) -> Distiller:
        options = self._options
        cast = torch.bfloat16 if options.autocast else None
        return Distiller(self._graph, options.weights, checkpointing=options.checkpointing, autocast=cast)

    def _look_at_weights(self) -> None:
        """Before they are saved: stop where the last update overflowed, which no loss has shown yet."""
        if not self._finite():
            self._spoilt(f"step {self.done}: the update left weights that are not finite")

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for edit in self._active for p in self._masters.groups[edit])

    def _spoilt(self, reason: str) -> None:
        """Stop all edits, for those of a problem may share weights: with the weights of the last update, or, where that
        overflowed, with those of the last checkpoint, or of the beginning.
        """
        self._optimizer.zero_grad(set_to_none=True)
        finite = self._finite()
        if not finite:
            last = checkpoints.latest(self._folder, self._identity)
            with torch.no_grad():
                for name, parameter in self.tensors.items():
                    parameter.copy_(last.tensors[f"students.{name}"] if last is not None else self._read(name))
        for edit in list(self._active):
            if finite:
                self._average.settle(edit)
            else:
                self._average.forget(edit)
            self._halt(edit, Stop(step=self.done, kind="nan", reason=reason))

    def _halt(self, edit: str, stop: Stop) -> None:
        """Train an edit no further."""
        self.curves.stopped[edit] = stop
        level = logging.WARNING if stop.kind == "nan" else logging.INFO
        _log.log(level, "stage %s: %s stopped, %s", self.curves.label, edit, stop.reason)
        self._drop(edit)

    def _drop(self, edit: str) -> None:
        """Keep nothing for an edit that only training needs, and compute nothing that only its loss needs."""
        for parameter in self._masters.groups[edit]:
            parameter.grad = None
            self._optimizer.state.pop(parameter, None)
        for parameter in self._active[edit]:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._active = {other: mine for other, mine in self._active.items() if other != edit}
        if self._active:
            without_edit(self._graph, edit)
            self._distiller = self._distil()

    def _resume(self) -> None:
        found = checkpoints.latest(self._folder, self._identity)
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self.tensors.items():
                parameter.copy_(found.tensors[f"students.{name}"])
        self._masters.load(found.tensors)
        self._average.load(found.tensors)
        checkpoints.load_optimizer_state(self._optimizer, found.tensors)
        self.curves = found.state.curves[0].model_copy(deep=True)
        self.done = found.state.step
        for edit in self.curves.stopped:
            self._average.forget(edit)
            self._drop(edit)
