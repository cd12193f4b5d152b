"""What each trained student does to the model's output, and how far the sum of it is from what mixtures do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import state_digest
from ppcl_fx.passes.selection.knapsack import touching
from ppcl_fx.schema.measured_effects import Effect, Effects, Mixture
from ppcl_fx.schema.plan import plan_digest
from ppcl_fx.train.core.batches import moved

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.schema.curves import StageCurves

RATIOS = 6
"""Shares of the parameters at which the report compares what was predicted with what was measured."""
Told = Callable[[int, int], None]
"""Told how many edits are measured, and of how many."""
_log = logging.getLogger("ppcl_fx.train")


class OutputErrors:
    """Relative squared errors of mixtures' outputs against the teacher's, on some calls; each is computed once.

    Args:
        model: the pluggable model; its mixture, mode and weights are as before after each measurement.
        calls: recorded calls of its teacher. Recorded outputs are used where the teacher gives the same to the bit,
            which is looked at once for each shape.
        only: positions of the calls; all of them if None.
    """

    def __init__(self, model: PluggableModel, calls: Calls, only: Sequence[int] | None = None) -> None:
        self.model, self.calls = model, calls
        self.only = list(range(len(calls)) if only is None else only)
        if not self.only:
            raise PpclError("no calls to measure the students' effects on: give at least one")
        self._teachers: list[Tensor] = []
        self._known: dict[frozenset[str], float] = {frozenset(): 0.0}
        self._same: dict[tuple[tuple[int, ...], torch.dtype], bool] = {}

    @property
    def samples(self) -> int:
        """Number of samples in the calls."""
        return sum(self.calls[index].batch for index in self.only)

    def of(self, students: Sequence[str]) -> float:
        """Return the error of the mixture with some edits plugged: the sum of the squared differences over all calls,
        divided by the sum of the teacher's squares.

        Raises:
            PpclError: an output is not finite, or all of the teacher's are zero.
        """
        mixture = frozenset(students)
        if mixture not in self._known:
            if not self._teachers:
                self._teachers = self._run((), self._teacher)
            runs = self._run(students, self._output)
            pairs = list(zip(runs, self._teachers, strict=True))
            apart = sum(_square(ours.double() - theirs.double()) for ours, theirs in pairs)
            whole = sum(_square(theirs.double()) for _, theirs in pairs)
            if whole == 0.0:
                raise PpclError("all of the teacher's outputs are zero, so errors mean nothing: record other calls")
            error = apart / whole
            if not math.isfinite(error):
                names = ", ".join(students)
                raise PpclError(f"the output with {names} plugged holds NaN or infinity: train these edits again")
            self._known[mixture] = error
        return self._known[mixture]

    def _run(self, students: Sequence[str], output: Callable[[int], Tensor]) -> list[Tensor]:
        model = self.model
        before, training = model.students, model.training
        try:
            model.plug(students=students).eval()
            with torch.no_grad():
                return [output(index) for index in self.only]
        finally:
            model.plug(students=before).train(training)

    def _output(self, index: int) -> Tensor:
        kwargs = moved(self.calls[index].kwargs, self.model.device, self.model.dtype)
        output: Tensor = self.model(**{**kwargs, "return_dict": False})[0]
        return output.cpu()

    def _teacher(self, index: int) -> Tensor:
        """Return the teacher's output: as recorded, where that is known to be the same for this shape."""
        recorded = self.calls[index].output
        if recorded is None:
            return self._output(index)
        kind = (tuple(recorded.shape), recorded.dtype)
        if self._same.get(kind):
            return recorded
        computed = self._output(index)
        self._same.setdefault(kind, computed.dtype == recorded.dtype and torch.equal(computed, recorded))
        return computed


def measure_effects(
    model: PluggableModel,
    calls: Calls,
    *,
    only: Sequence[int] | None = None,
    losses: Mapping[str, float] | None = None,
    errors: OutputErrors | None = None,
    progress: Told | None = None,
) -> Effects:
    """Measure what each edit does to the model's output, plugged alone: one forward pass a call and edit.

    An edit that changes nothing but another one's student (a projector in a student block) is measured with that one
    plugged, and what it adds counts.

    Args:
        model: a pluggable model, trained. Nothing of it changes; assign the result to `model.effects` to have
            `plug(keep=...)` use it.
        calls: recorded calls of its teacher, held out if possible.
        only: positions of the calls to use; all of them if None.
        losses: each student's loss on held-out calls, to keep beside the effects (`held_out_losses`).
        errors: the same calls' errors, where some are computed already; `calls` and `only` are then its own.
        progress: told after each edit.

    Raises:
        PpclError: there are no calls, or an output is not finite.
    """
    errors = OutputErrors(model, calls, only) if errors is None else errors
    losses = losses or {}
    touch = touching(model.plan.edits)
    found = []
    for done, edit in enumerate(model.edits, start=1):
        on = _host(model, edit, touch[edit])
        error = errors.of([edit]) if on is None else max(0.0, errors.of([on, edit]) - errors.of([on]))
        found.append(Effect(edit=edit, error=error, on=[] if on is None else [on], loss=losses.get(edit)))
        if progress is not None:
            progress(done, len(model.edits))
    return Effects(
        plan=plan_digest(model.plan),
        students=state_digest(model.students_module.state_dict()),
        calls=errors.calls.fingerprint,
        measured_on=errors.only,
        samples=errors.samples,
        edits=found,
    )


def predicted_and_measured(
    model: PluggableModel,
    calls: Calls,
    keeps: Sequence[float] | None = None,
    *,
    only: Sequence[int] | None = None,
    errors: OutputErrors | None = None,
) -> list[Mixture]:
    """Compare, for some shares of the parameters, the sum of the plugged edits' effects with the mixture's own error.

    Args:
        model: a pluggable model that has `effects`; its mixture stays as it is.
        calls: recorded calls of its teacher.
        keeps: the shares; by default `RATIOS` of them, evenly spaced from all students plugged to the teacher.
        only: positions of the calls to use; all of them if None.
        errors: as in `measure_effects`.

    Raises:
        PpclError: the model has no effects, or a share is out of reach.
    """
    effects = model.effects
    if effects is None:
        raise PpclError("this model has no measured effects to predict from: measure them first (measure_effects)")
    errors = OutputErrors(model, calls, only) if errors is None else errors
    before = model.students
    found = []
    for keep in ratios(model) if keeps is None else keeps:
        try:
            students = model.plug(keep=keep).students
        finally:
            model.plug(students=before)
        found.append(
            Mixture(
                keep=keep,
                params=model.param_count(students),
                students=list(students),
                predicted=effects.predicted(students),
                measured=errors.of(students),
            )
        )
    return found


def with_mixtures(
    model: PluggableModel, calls: Calls, only: Sequence[int], stages: Sequence[StageCurves] = ()
) -> Effects:
    """Measure the effects of a trained model's edits, set them as its own, and add predicted against measured.

    Args:
        model: the model.
        calls: recorded calls of its teacher.
        only: positions of the calls to use.
        stages: the curves of its training.

    Raises:
        PpclError: as in `measure_effects`.
    """
    _log.info("measuring the effects of %d edits on %d calls", len(model.edits), len(only))
    errors = OutputErrors(model, calls, only)
    model.effects = measure_effects(model, calls, losses=held_out_losses(stages), errors=errors)
    mixtures = predicted_and_measured(model, calls, errors=errors)
    model.effects = model.effects.model_copy(update={"mixtures": mixtures})
    return model.effects


def held_out_losses(stages: Sequence[StageCurves]) -> dict[str, float]:
    """Return each edit's last loss on held-out calls, of the stages that distil it."""
    distilled = [stage for stage in stages if stage.name != "finetune"]
    return {edit: values[-1][1] for stage in distilled for edit, values in stage.held_out.items() if values}


def ratios(model: PluggableModel, count: int = RATIOS) -> list[float]:
    """Return shares of the parameters, evenly spaced from the least there is up to, and without, the whole teacher."""
    least = model.param_count(model.edits) / model.teacher_params
    # Rounded up, so that the first one can be reached.
    return [min(1.0, math.ceil(1e4 * (least + (1.0 - least) * step / count)) / 1e4) for step in range(count)]


def _host(model: PluggableModel, edit: str, near: frozenset[str]) -> str | None:
    """Return the edit whose student is all that `edit` changes, None where it changes the teacher's blocks."""
    if model.param_count([edit]) != model.teacher_params:
        return None
    others = [other for other in model.edits if other in near]
    return next((other for other in others if model.param_count([other, edit]) != model.param_count([other])), None)


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
