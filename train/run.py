"""`train`: checks what was asked for, then runs the stages one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.model.student_folder import save_finetuned
from ppcl_fx.schema.curves import LOSSES, Losses, StageCurves
from ppcl_fx.schema.plan import plan_digest
from ppcl_fx.train.checks import CHECKPOINTS, LOGS, check_here, check_places
from ppcl_fx.train.config import CONFIG, TrainConfig, resolve
from ppcl_fx.train.config import save as save_config
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.batches import Batches, Data
from ppcl_fx.train.core.checkpoints import CheckpointWriter, LoadedCheckpoint, RunIdentity
from ppcl_fx.train.core.distillation_graph import train_only
from ppcl_fx.train.core.loop import Progress, Whole, run_stage
from ppcl_fx.train.core.stage_trainer import StageTrainer
from ppcl_fx.train.core.stages import Compute, Distillation, FineTuning, Stage
from ppcl_fx.train.data.source import DataSource, Feed
from ppcl_fx.train.distributed.consensus import (
    StopRequest,
    begin,
    fit_again,
    listening,
    refuse_on_ranks,
    share_checkpoints,
)
from ppcl_fx.train.distributed.edit_parallel import EditParallel
from ppcl_fx.train.distributed.process_group import ProcessGroup, current
from ppcl_fx.train.metrics.effects import with_mixtures
from ppcl_fx.train.metrics.logger import MetricsLogger, Show

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.pluggable import PluggableModel

Score = Callable[[str, Any], float]
"""Told the stage and the model so far; returns how good it is."""
_log = logging.getLogger("ppcl_fx.train")


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        stages: The curves, one entry a stage.
        seconds: Wall time of this process's part (a resumed run's earlier part is in the stages' own seconds).
        folder: The output folder.
        losses: The file with the curves, for the report.
        checkpoints: The folder of the checkpoints.
        finetuned: The folder of the fine-tuned model, None without that stage.
        finetuned_model: The fine-tuned model itself, a plain graph called like the teacher; None without that stage,
            and on all ranks but the first.
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
    calls: Calls | DataSource,
    *,
    out: str | Path,
    config: str | Path | TrainConfig | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    watch: Show | None = None,
    score: Score | None = None,
    **options: Any,
) -> TrainResult:
    """Train a pluggable model's students in place, and fine-tune one mixture of it.

    SIGTERM and Ctrl-C write a checkpoint and raise `ppcl_fx.errors.Stopped`.

    Args:
        model: The pluggable model; stages "depth" and "width" train its students, "finetune" leaves it as it
            is. With the option `effects`, `model.effects` holds what each student does to the output.
        calls: Recorded calls of the teacher, or a source that makes its data as training goes on
            (`ppcl_fx.train.sources`).
        out: Folder for checkpoints, logs, `losses.json`, `train.toml` (the complete options) and the fine-tuned
            model.
        config: A TOML file with options, or options; the defaults are those of `TrainConfig`.
        resume: Go on from the last checkpoint in `out`, to the bit; without one, begin.
        progress: Called after each step with stage, steps done, steps in all and the summed loss.
        watch: Called after each step with all that is known of it.
        score: Called at each evaluation with the stage's name and the model as it would come out: the pluggable
            model, all students plugged, or the fine-tuned graph. Returns a number to log, more being better. With the
            option `score_prompts` the shipped model has a callback of its own.
        **options: The fields of `TrainConfig` by name, over those of `config`; steps may be a mapping from stage to
            steps. docs/training.md lists all.

    Raises:
        PpclError: An option is unknown or makes no sense, a LoRA is loaded, the calls hold NaN, every loss becomes
            NaN, the output or the log cannot be written, a checkpoint in `out` belongs to something else or (without
            `resume`) to a run that has not ended.
        Stopped: A signal stopped the run; it can be resumed.
    """
    began = time.perf_counter()
    ranks = current()
    model.require_no_lora("training")
    folder = Path(out)
    chosen = resolve(config, **options)
    busy = _busy(model, chosen)
    cast = _autocast(model, busy.autocast, ranks.device or model.device)
    if set(busy.stages) - {"finetune"}:
        model.effects = None  # they were the effects of the students before this training
    students = _mixture(model, busy.keep)
    data = Data(calls, busy, ranks)
    check_here(busy, ranks.device or model.device)
    named_cast = None if cast is None else str(cast).removeprefix("torch.")
    decisive = {**busy.decisive(), "autocast": named_cast, "students": list(students)}
    identity = RunIdentity(plan=plan_digest(model.plan), calls=data.fingerprint, options=decisive)
    logs = Path(busy.log) if busy.log is not None else folder / LOGS
    refuse_on_ranks(ranks, busy, score is not None or busy.score_prompts > 0)
    finetuned = folder / f"finetuned{_suffix(busy)}" if "finetune" in busy.stages else None
    if ranks.first:
        check_places(folder, logs, finetuned)
    if score is None and busy.score_prompts:
        score = _shapes_score(model, busy.score_prompts)
    start = begin(ranks, lambda: _starting_point(folder / CHECKPOINTS, identity, resume))
    follower = MetricsLogger(
        logs if ranks.first else None,
        model.device,
        log_every=busy.log_every,
        tensorboard=busy.tensorboard,
        show=watch if ranks.first else None,
        count=not busy.compile,
    )
    if ranks.first:
        save_config(chosen, folder / CONFIG)
    compute = Compute(busy.checkpointing, cast, busy.compile_backend if busy.compile else None)
    named = dict(model.students_module.named_parameters())
    writer = CheckpointWriter(folder / CHECKPOINTS, identity, named, model.device)
    runner = _Runner(model, busy, compute, students, writer, ranks, score)
    with _training(model, busy.seed), listening(ranks) as asked:
        try:
            for trainer in runner.trainers(data, start, asked):
                run_stage(trainer, follower, progress if ranks.first else None)
            if runner.finetuned is not None and finetuned is not None:
                save_finetuned(runner.finetuned, model, list(students), finetuned)
        finally:
            follower.close()
    losses = Losses(plan=identity.plan, calls=identity.calls, sequential=busy.sequential, stages=writer.curves)
    if ranks.first:
        losses.save(folder / LOSSES)
    ranks.barrier()
    if busy.effects and ranks.first:
        _measure(model, *data.measured_on(busy.effects), writer.curves)
    return TrainResult(
        stages=tuple(writer.curves),
        seconds=time.perf_counter() - began,
        folder=folder,
        losses=folder / LOSSES,
        checkpoints=folder / CHECKPOINTS,
        finetuned=finetuned,
        finetuned_model=runner.finetuned,
    )


@dataclass
class _Runner:
    """Builds each stage when its turn comes, and ends it."""

    model: PluggableModel
    config: TrainConfig
    compute: Compute
    students: tuple[str, ...]
    writer: CheckpointWriter
    ranks: ProcessGroup
    score: Score | None
    finetuned: GraphModule | None = None
    """The fine-tuned model, once that stage has ended."""

    def trainers(self, data: Data, start: LoadedCheckpoint | None, stop: StopRequest) -> Iterator[StageTrainer]:
        """Yield what trains each stage that is not done yet; it has been run when the next one is asked for."""
        config = self.config
        for number, (name, total) in enumerate(zip(config.stages, config.steps, strict=True)):
            if start is not None and number < start.state.stage:
                continue
            resumed = start if start is not None and number == start.state.stage else None
            if resumed is None:
                self.writer.curves.append(StageCurves(name=name, label=name + _suffix(config) * (name == "finetune")))
            else:
                self.writer.restore(resumed)
                self.model.weights_changed()
            train_only(self.model, name)
            stage = self._stage(name)
            resumed = share_checkpoints(self.ranks, stage, self.writer, resumed)
            feed = data.feed(name, self.model)
            recorded = isinstance(stage, FineTuning) and self._use_recorded(stage, feed)
            batches = data.held_out(name, self.model)
            held = [partial(Whole(batches, recorded).parts, i) for i in range(len(batches))] if batches else []
            score = partial(self._scored, name, stage, self.score) if self.score is not None else None
            trainer = StageTrainer(stage, Whole(feed, recorded), self.writer, config, total, held, score, stop)
            if resumed is not None:
                trainer.restore(resumed)
            yield trainer
            if isinstance(stage, EditParallel):
                stage.share()
            if name == "depth":
                fit_again(self.model, data.each(self.model), self.ranks)
            self.model.weights_changed()
            if isinstance(stage, FineTuning):
                self.finetuned = stage.result()

    def _use_recorded(self, stage: FineTuning, feed: Feed) -> bool:
        wanted = self.config.recorded
        # A share of a batch may round otherwise than the batch that was recorded: with several ranks it is computed.
        exact = wanted == "exact" and self.ranks.alone
        use = wanted == "always" or (isinstance(feed, Batches) and exact and stage.gives(feed))
        _log.info("finetune: the teacher's outputs are %s", "read from the calls" if use else "computed")
        return use

    def _scored(self, name: str, stage: Stage, ask: Score) -> float:
        self.model.weights_changed()
        try:
            with _mixture_kept(self.model), torch.no_grad():
                whole = stage.student if isinstance(stage, FineTuning) else self.model.plug(students=self.model.edits)
                return float(ask(name, whole))
        finally:
            self.model.weights_changed()

    def _stage(self, name: str) -> Stage:
        model, weights, compute = self.model, self.config.weights, self.compute
        if self.ranks.alone and name == "finetune":
            return FineTuning(model, self.students, compute)
        if self.ranks.alone:
            return Distillation(model, name, weights, sequential=self.config.sequential, compute=compute)
        if name == "finetune":
            from ppcl_fx.train.distributed.fsdp import FSDPFineTuning

            return FSDPFineTuning(model, self.students, self.ranks, compute)
        return EditParallel(model, name, weights, self.ranks, compute)


def _suffix(options: TrainConfig) -> str:
    return "" if options.keep is None else f"-{options.keep:g}"


def _busy(model: PluggableModel, config: TrainConfig) -> TrainConfig:
    """Return the options without the stages for which the plan has no edit."""
    kinds = {edit.kind for edit in model.plan.edits}
    if not kinds:
        raise PpclError("the plan has no edits, so there is nothing to train: rewrite with a smaller --keep")
    busy = {"depth": "depth" in kinds, "width": bool(kinds - {"depth"}), "finetune": True}
    for name in config.stages:
        if not busy[name]:
            _log.info("stage %s left out: the plan has no edit of that kind", name)
    left = {name: count for name, count in zip(config.stages, config.steps, strict=True) if busy[name]}
    if not left:
        raise PpclError(f"the plan has no edit for stage {','.join(config.stages)}: train another stage")
    return config.model_copy(update={"stages": tuple(left), "steps": tuple(left.values())})


def _mixture(model: PluggableModel, keep: float | None) -> tuple[str, ...]:
    """Return the edits of the mixture to fine-tune."""
    with _mixture_kept(model):
        return tuple(model.edits if keep is None else model.plug(keep=keep).students)


@contextmanager
def _mixture_kept(model: PluggableModel) -> Iterator[None]:
    """Plug the present mixture again afterwards."""
    before = list(model.students)
    try:
        yield
    finally:
        model.plug(students=before)


def _measure(model: PluggableModel, calls: Calls, only: Sequence[int], curves: Sequence[StageCurves]) -> None:
    """Measure the students' effects; where that cannot be done, a warning, and the training is kept."""
    try:
        with_mixtures(model, calls, only, curves)
    except PpclError as error:
        model.effects = None
        _log.warning("the students' effects were not measured: %s", error)


def _autocast(model: PluggableModel, wanted: bool | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype to cast matrix products to on `device`, or None."""
    if wanted is None:
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported()
        wanted = cuda and model.dtype == torch.float32
    return torch.bfloat16 if wanted else None


def _starting_point(folder: Path, identity: RunIdentity, resume: bool) -> LoadedCheckpoint | None:
    """Return the checkpoint to go on from, or None to begin, with the checkpoints of an ended run out of the way."""
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


def _shapes_score(model: PluggableModel, count: int) -> Callable[[str, Any], float]:
    """Return a callback that draws `count` pictures a category with the model so far and returns their overall score.
    Raises PpclError where the model's teacher is not the shapes model that ships with the package.
    """
    from ppcl_fx.io.fingerprint import fingerprint
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.schema.plan import Plan
    from ppcl_fx.shapes import load_pipeline
    from ppcl_fx.shapes.score import score

    pipeline = load_pipeline(model.dtype)
    own = pipeline.transformer
    if model.plan.model and fingerprint(own) != model.plan.model:
        raise PpclError(
            "training option score_prompts: only students of the shipped 'shapes' model have a score; set it to 0"
        )
    pipeline.set_progress_bar_config(disable=True)

    def scored(stage: str, whole: Any) -> float:
        pipeline.transformer = PluggableModel(whole, Plan()) if stage == "finetune" else whole
        try:
            return score(pipeline, count)["overall"]
        finally:
            pipeline.transformer = own

    return scored


@contextmanager
def _training(model: PluggableModel, seed: int) -> Iterator[None]:
    """Put the gradients' flags and the random state back afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
