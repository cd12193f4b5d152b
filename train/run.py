"""`train`: what the command line and Python call. Checks what was asked for, then runs the stages one after
the other.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.train import checkpoints
from ppcl_fx.train.checkpoints import Checkpoint, Identity
from ppcl_fx.train.curves import LOSSES, Losses, StageCurves
from ppcl_fx.train.data import Batches
from ppcl_fx.train.finetuned import plan_digest, save_finetuned
from ppcl_fx.train.loop import Journal, Progress, run_stage
from ppcl_fx.train.losses import Weights
from ppcl_fx.train.options import STAGES, Options, TermWeights, plan_stages
from ppcl_fx.train.stages import Distillation, FineTuning, Stage

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.model import PluggableModel

CHECKPOINTS = "checkpoints"
_log = logging.getLogger("ppcl_fx.train")


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        stages: The curves, one entry a stage.
        seconds: Wall time of this process's part (a resumed run's earlier part is in the stages' own
            seconds).
        folder: The output folder.
        losses: The file with the curves, for the report.
        checkpoints: The folder of the checkpoints.
        finetuned: The folder of the fine-tuned model, None without that stage.
        finetuned_model: The fine-tuned model itself, a plain graph called like the teacher; None without that
            stage.
    """

    stages: tuple[StageCurves, ...]
    seconds: float
    folder: Path
    losses: Path
    checkpoints: Path
    finetuned: Path | None
    finetuned_model: GraphModule | None


def train(
    model: PluggableModel,
    calls: Calls,
    *,
    stages: Sequence[str] = STAGES,
    steps: Sequence[int] | Mapping[str, int] = (600, 200, 100),
    out: str | Path,
    resume: bool = False,
    batch: int = 2,
    lr: float = 1e-3,
    finetune_lr: float = 3e-4,
    seed: int = 42,
    sequential: bool = False,
    checkpointing: bool = False,
    autocast: bool | None = None,
    keep: float | None = None,
    weights: Weights | None = None,
    clip: float | None = 1.0,
    ema: float | None = None,
    every: int = 100,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a pluggable model's students in place, and fine-tune one mixture of it.

    Args:
        model: The pluggable model; stages "depth" and "width" train its students, "finetune" leaves it as it
            is.
        calls: Recorded calls of the teacher.
        stages: Some of "depth", "width", "finetune", in the order to run.
        steps: Steps for each stage, in the same order, or by name.
        out: Folder for checkpoints, `losses.json` and the fine-tuned model.
        resume: Go on from the last checkpoint in `out`, to the bit; without one, begin.
        batch: Calls for one step (each with its own batch of samples).
        lr: Peak learning rate of "depth" and "width".
        finetune_lr: Peak learning rate of "finetune".
        seed: Decides the order of the calls.
        sequential: Distil sequentially (the paper's control) in "depth" and "width".
        checkpointing: Gradient checkpointing: less memory, one more forward pass of what trains.
        autocast: bf16 matrix products with float32 weights; None: for a float32 model where the machine has
            it (CUDA). A model stored in 16 bits computes in them, and trains float32 masters of its weights.
        keep: The share of the teacher's parameters of the mixture to fine-tune; None: all students.
        weights: Weights of the loss terms.
        clip: The largest norm of the gradients of one edit, None for no limit.
        ema: Decay of an average of the weights in fine-tuning, None for none.
        every: Steps between checkpoints.
        progress: Called after each step with stage, steps done, steps in all and the summed loss.

    Returns:
        The curves and paths.

    Raises:
        PpclError: An option makes no sense, a LoRA is loaded, the calls hold NaN, a loss becomes NaN, the output
            cannot be written, a checkpoint in `out` belongs to something else or (without `resume`) to a run that has
            not ended.
    """
    began = time.perf_counter()
    model.require_no_lora("training")
    folder = Path(out)
    cast = _autocast(model, autocast)
    students = _mixture(model, keep)
    options = _options(
        model,
        stages,
        steps,
        batch=batch,
        lr=lr,
        finetune_lr=finetune_lr,
        seed=seed,
        sequential=sequential,
        autocast=None if cast is None else str(cast).removeprefix("torch."),
        students=students,
        weights=TermWeights(**vars(weights or Weights())),
        clip=clip,
        ema=ema,
        checkpointing=checkpointing,
        every=every,
    )
    identity = Identity(plan=plan_digest(model.plan), calls=calls.fingerprint, options=options.decisive())
    _check_writable(folder)
    start = _starting_point(folder / CHECKPOINTS, identity, resume)
    runner = _Runner(model, options, cast, identity, folder, "" if keep is None else f"-{keep:g}", progress)
    with _training(model, seed):
        finetuned = runner.run(calls, start)
    losses = Losses(
        plan=identity.plan, calls=identity.calls, sequential=sequential, stages=runner.journal.curves
    )
    losses.save(folder / LOSSES)
    return TrainResult(
        stages=tuple(runner.journal.curves),
        seconds=time.perf_counter() - began,
        folder=folder,
        losses=folder / LOSSES,
        checkpoints=folder / CHECKPOINTS,
        finetuned=runner.finetuned_folder if finetuned is not None else None,
        finetuned_model=finetuned,
    )


class _Runner:
    """Builds each stage when its turn comes and runs it."""

    def __init__(
        self,
        model: PluggableModel,
        options: Options,
        cast: torch.dtype | None,
        identity: Identity,
        folder: Path,
        suffix: str,
        progress: Progress | None,
    ) -> None:
        self._model = model
        self._options = options
        self._cast = cast
        self._progress = progress
        self._suffix = suffix
        self.finetuned_folder = folder / f"finetuned{suffix}"
        students = dict(model.students_module.named_parameters())
        self.journal = Journal(folder / CHECKPOINTS, identity, students, options.every, model.device)

    def run(self, calls: Calls, start: Checkpoint | None) -> GraphModule | None:
        """Run all stages that are not done yet; return the fine-tuned model, if there is one."""
        options = self._options
        batches = Batches(
            calls, options.batch, options.seed, device=self._model.device, dtype=self._model.dtype
        )
        for number, (name, total) in enumerate(zip(options.stages, options.steps, strict=True)):
            if start is not None and number < start.state.stage:
                continue
            resumed = start if start is not None and number == start.state.stage else None
            if resumed is None:
                self.journal.curves.append(StageCurves(name=name, label=self._label(name)))
            else:
                self.journal.restore(resumed)
                _forget_mixtures(self._model)
            stage = self._stage(name)
            self._run_stage(stage, batches, number, total, resumed)
            _forget_mixtures(self._model)
            if isinstance(stage, FineTuning):
                finetuned = stage.result()
                save_finetuned(finetuned, self._model, list(options.students), self.finetuned_folder)
                return finetuned
        return None

    def _run_stage(
        self, stage: Stage, batches: Batches, number: int, total: int, resumed: Checkpoint | None
    ) -> None:
        options = self._options
        run_stage(
            stage,
            batches,
            self.journal,
            number=number,
            total=total,
            lr=options.finetune_lr if isinstance(stage, FineTuning) else options.lr,
            clip=options.clip,
            start=resumed,
            progress=self._progress,
        )

    def _label(self, name: str) -> str:
        return name + self._suffix if name == "finetune" else name

    def _stage(self, name: str) -> Stage:
        options = self._options
        if name == "finetune":
            return FineTuning(
                self._model,
                options.students,
                ema=options.ema,
                checkpointing=options.checkpointing,
                autocast=self._cast,
            )
        return Distillation(
            self._model,
            name,
            Weights(**options.weights.model_dump()),
            sequential=options.sequential,
            checkpointing=options.checkpointing,
            autocast=self._cast,
        )


def _busy_stages(
    model: PluggableModel, stages: Sequence[str], steps: Sequence[int] | Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Check the stages and leave out those for which the plan has no edit."""
    names, counts = plan_stages(stages, steps)
    kinds = {edit.kind for edit in model.plan.edits}
    if not kinds:
        raise PpclError("the plan has no edits, so there is nothing to train: rewrite with a smaller --keep")
    busy = {"depth": "depth" in kinds, "width": bool(kinds - {"depth"}), "finetune": True}
    for name in names:
        if not busy[name]:
            _log.info("stage %s left out: the plan has no edit of that kind", name)
    left = [(name, count) for name, count in zip(names, counts, strict=True) if busy[name]]
    if not left:
        raise PpclError(f"the plan has no edit for stage {','.join(names)}: train another stage")
    return tuple(name for name, _ in left), tuple(count for _, count in left)


def _options(
    model: PluggableModel, stages: Sequence[str], steps: Sequence[int] | Mapping[str, int], **rest: Any
) -> Options:
    names, counts = _busy_stages(model, stages, steps)
    try:
        return Options(stages=names, steps=counts, **rest)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise PpclError(f"training option {where}: {fault['msg'].lower()}, not {fault['input']!r}") from None


def _mixture(model: PluggableModel, keep: float | None) -> tuple[str, ...]:
    """Return the edits of the mixture to fine-tune."""
    before = tuple(model.students)
    try:
        return tuple(model.edits) if keep is None else tuple(model.plug(keep=keep).students)
    finally:
        model.plug(students=list(before))


def _autocast(model: PluggableModel, wanted: bool | None) -> torch.dtype | None:
    """Return the dtype to cast matrix products to, or None."""
    if wanted is None:
        cuda = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
        wanted = cuda and model.dtype == torch.float32
    return torch.bfloat16 if wanted else None


def _check_writable(folder: Path) -> None:
    """Make the output folder now: better than finding out at the first checkpoint that it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{folder}: cannot be written ({reason}); choose a writable folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PpclError(f"{folder}: cannot be written; choose a writable folder")


def _starting_point(folder: Path, identity: Identity, resume: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None to begin, with the checkpoints of an ended run out of the
    way.
    """
    if resume:
        return checkpoints.latest(folder, identity)
    last = checkpoints.peek(folder)
    if last is not None and not last.ended:
        raise PpclError(
            f"{folder}: holds a training that stopped at stage {last.curves[-1].label}, step {last.step}; "
            "resume it, remove that folder, or train into another one"
        )
    checkpoints.clear(folder)
    return None


@contextmanager
def _training(model: PluggableModel, seed: int) -> Iterator[None]:
    """Let the students train, and nothing else; put the gradients' flags and the random state back
    afterwards.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model.requires_grad_(False)
            model.students_module.requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None


def _forget_mixtures(model: PluggableModel) -> None:
    """Drop the mixtures that were built before: they may hold what the students' weights were."""
    model.to(model.device)  # a move, even to where it is, drops them
