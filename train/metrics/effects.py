"""What each trained student does to the model's output, and how far the sum of it is from what mixtures do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import state_digest
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.passes.selection.knapsack import touching
from ppcl_fx.schema.curves import StageCurves
from ppcl_fx.schema.measured_effects import Effect, Effects, Mixture
from ppcl_fx.schema.plan import plan_digest
from ppcl_fx.train.core.batches import moved

RATIOS = 6  # shares of the parameters at which the report compares what was predicted with what was measured
_log = logging.getLogger("ppcl_fx.train")


class OutputErrors:
    """Relative squared errors of mixtures' outputs against the teacher's, on some calls; each is computed once.

    The model is as before after each measurement; what outputs were recorded does not count. `only` are positions of
    the calls; all of them if None.
    """

    def __init__(self, model: PluggableModel, calls: Calls, only: Sequence[int] | None = None) -> None:
        self.model, self.calls = model, calls
        self.only = list(range(len(calls)) if only is None else only)
        if not self.only:
            raise PpclError("no calls to measure the students' effects on: give at least one")
        self._teachers: list[Tensor] = []
        self._known: dict[frozenset[str], float] = {frozenset(): 0.0}

    def of(self, students: Sequence[str]) -> float:
        """Return the error of the mixture with some edits plugged: the sum of the squared differences over all calls,
        divided by the sum of the teacher's squares. Raises PpclError where an output is not finite, or the
        teacher's are zero.
        """
        mixture = frozenset(students)
        if mixture in self._known:
            return self._known[mixture]
        if not self._teachers:
            self._teachers = self._run(())
        pairs = list(zip(self._run(students), self._teachers, strict=True))
        apart = sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in pairs)
        whole = sum(float(theirs.double().square().sum()) for _, theirs in pairs)
        if whole == 0.0:
            raise PpclError("all of the teacher's outputs are zero, so errors mean nothing: record other calls")
        error = apart / whole
        if not math.isfinite(error):
            names = ", ".join(students)
            raise PpclError(f"the output with {names} plugged holds NaN or infinity: train these edits again")
        self._known[mixture] = error
        return error

    def _run(self, students: Sequence[str]) -> list[Tensor]:
        model = self.model
        before, training = model.students, model.training
        try:
            model.plug(students=students).eval()
            given = (moved(self.calls[index].kwargs, model.device, model.dtype) for index in self.only)
            with torch.no_grad():
                return [model(**{**kwargs, "return_dict": False})[0].cpu() for kwargs in given]
        finally:
            model.plug(students=before).train(training)


def measure_effects(
    model: PluggableModel,
    calls: Calls | OutputErrors,
    *,
    only: Sequence[int] | None = None,
    losses: Mapping[str, float] | None = None,
) -> Effects:
    """Measure what each edit does to the model's output, plugged alone: one forward pass a call and edit.

    An edit that changes nothing but another one's student (a projector in a student block) is measured with that one
    plugged, and what it adds counts.

    Args:
        model: a pluggable model, trained. Nothing of it changes; assign the result to `model.effects` to have
            `plug(keep=...)` use it.
        calls: recorded calls of its teacher, held out if possible; or their errors, of which some are known.
        only: positions of the calls to use; all of them if None.
        losses: each student's loss on held-out calls, to keep beside the effects (`held_out_losses`).

    Raises:
        PpclError: there are no calls, or an output is not finite.
    """
    errors = calls if isinstance(calls, OutputErrors) else OutputErrors(model, calls, only)
    losses = losses or {}
    touch = touching(model.plan.edits)
    found = []
    for edit in model.edits:
        on = _host(model, edit, touch[edit])
        error = errors.of([edit]) if on is None else max(0.0, errors.of([on, edit]) - errors.of([on]))
        found.append(Effect(edit=edit, error=error, on=[] if on is None else [on], loss=losses.get(edit)))
    return Effects(
        plan=plan_digest(model.plan),
        students=state_digest(model.students_module.state_dict()),
        calls=errors.calls.fingerprint,
        measured_on=errors.only,
        samples=sum(errors.calls[index].batch for index in errors.only),
        edits=found,
    )


def predicted_and_measured(
    model: PluggableModel,
    calls: Calls | OutputErrors,
    keeps: Sequence[float] | None = None,
    *,
    only: Sequence[int] | None = None,
) -> list[Mixture]:
    """Compare, for some shares of the parameters, the sum of the plugged edits' effects with the mixture's own error.

    Args:
        model: a pluggable model that has `effects`; its mixture stays as it is.
        calls: as in `measure_effects`, and `only` too.
        keeps: the shares; by default `RATIOS` of them, evenly spaced from all students plugged to the teacher.

    Raises:
        PpclError: the model has no effects, or a share is out of reach.
    """
    effects = model.effects
    if effects is None:
        raise PpclError("this model has no measured effects to predict from: measure them first (measure_effects)")
    errors = calls if isinstance(calls, OutputErrors) else OutputErrors(model, calls, only)
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

    `only` are positions of the calls to use, `stages` the curves of its training. Raises as `measure_effects`.
    """
    _log.info("measuring the effects of %d edits on %d calls", len(model.edits), len(only))
    errors = OutputErrors(model, calls, only)
    model.effects = measure_effects(model, errors, losses=held_out_losses(stages))
    mixtures = predicted_and_measured(model, errors)
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
