"""`ppcl-fx export` and `ppcl-fx build`: one small graph for each ratio over shared weights, and engines of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx.cli import options as common
from ppcl_fx.cli.analyze import shipped_prompts
from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged, typed_error
from ppcl_fx.cli.options import Overwrite, Recorded
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import OptionError, PpclError
from ppcl_fx.export.config import FOLDERS, KEEPS, ROUNDED_FOR_CALLS, ExportConfig
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.options import MOST, MOST_STEPS
from ppcl_fx.io.owned_folders import PRUNED_RATIOS, SAVED
from ppcl_fx.model.sources import check_source

if TYPE_CHECKING:
    from ppcl_fx.export.exporting import ExportResult
    from ppcl_fx.export.tensorrt.folder import Built
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder

SAMPLES = 2  # pictures of a sampling run, if nothing else is said
SEED = 42  # of the first picture's noise, as when calls are recorded


@flagged
def export(
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT",
            help="What 'ppcl-fx rewrite' or 'train' wrote; STUDENT/finetuned is the fine-tuned model.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="ENGINES", help="Folder for the exported files.")],
    config: ExportConfig,
    terminal: Terminal,
    calls: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Recorded calls to check with; random inputs if left out.")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The teacher's pipeline: compare whole sampling runs, with prompts of the recorded calls.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, metavar="N", help=f"Pictures of that run; {SAMPLES}.")
    ] = None,
    sample_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_STEPS,
            metavar="N",
            help="Denoising steps of that run; the pipeline's own number if left out.",
        ),
    ] = None,
) -> CommandResult:
    """Export STUDENT once for each share: ENGINES/keep-0.5.onnx and so on.

    Where ENGINES is STUDENT or a folder above it, the weights stay where they are. 'export STUDENT/finetuned' exports
    the fine-tuned model, as one file.
    """
    _check_uses(config, calls, pipeline, {"--samples": samples, "--sample-steps": sample_steps})
    if config.format in FOLDERS:
        common.check_output(out, kind=PRUNED_RATIOS, overwrite=config.overwrite, reads=[student])
    else:
        common.check_output(out)  # other ratios may be there: what is refused is a graph of the same name
    if pipeline is not None:
        check_source(pipeline)
    # In a student there are fine-tuned models alone, and a missing one has a line of its own.
    if not (student.parent / str(SAVED.manifest)).is_file():
        common.check_folder(student, "what 'ppcl-fx rewrite' wrote")
    common.check_folder(calls, "recorded calls", "index.json")

    from ppcl_fx.export.exporting import export as run
    from ppcl_fx.export.store.weight_source import stays_on_disk
    from ppcl_fx.model.pluggable import PluggableModel
    from ppcl_fx.model.student_folder import FinetunedFolder

    recorded = common.open_calls(calls, terminal) if calls is not None else None
    model = _opened(student, config, terminal, recorded)
    tuned = isinstance(model, FinetunedFolder)
    teacher = (model if isinstance(model, PluggableModel) else model.model).plan.model
    if recorded is not None:
        recorded.check(student, teacher)
    sampling = None
    if pipeline is not None and (isinstance(model, FinetunedFolder) or not stays_on_disk(model, config)):
        sampling = _open_sampling(pipeline, student, teacher, recorded, terminal)
        sampling = replace(sampling, prompts=sampling.prompts[: samples or SAMPLES], steps=sample_steps)
    notes: list[str] = []
    what = "the fine-tuned model" if tuned else f"{len(config.keep or KEEPS)} ratios"
    used = recorded.calls if recorded is not None else None
    with terminal.step(f"exporting {what}") as progress:
        exported = run(model, out, config, calls=used, sampling=sampling, progress=progress, note=notes.append)
    return _result(exported, config, notes)


@flagged
def build(
    folder: Annotated[Path, typer.Argument(metavar="ENGINES", help="What 'ppcl-fx export' wrote.")],
    given: Annotated[dict[str, Any], BuildConfig],
    terminal: Terminal,
    overwrite: Overwrite = False,
) -> CommandResult:
    """Build an engine for each graph in ENGINES: for the GPU of this machine, or for RTX cards.

    What is not said here is taken from ENGINES/build.json, which 'ppcl-fx export --onnx-only' wrote.
    """
    common.check_folder(folder, "what 'ppcl-fx export' wrote")
    from ppcl_fx.export.tensorrt.request import read_request

    try:
        config = read_request(folder).over(given)
    except OptionError as error:
        texts = {**given, **given.get("spec", {}), **given.get("options", {})}
        raise typed_error(error, BuildConfig, texts) from None

    from ppcl_fx.export.tensorrt.folder import build_folder

    with terminal.step("building engines") as report:
        engines = build_folder(folder, config, overwrite=overwrite, report=report)
    config.save(folder)
    lines = _engine_lines(engines)
    lines += [f"not checked: {what}" for what in dict.fromkeys(w for one in engines for w in one.manifest.not_checked)]
    return CommandResult({"folder": str(folder), "engines": [one.to_json() for one in engines]}, lines)


def _check_uses(
    config: ExportConfig, calls: Path | None, pipeline: str | None, sampling: dict[str, int | None]
) -> None:
    """Refuse options that have no use, before any long work."""
    if pipeline is not None and config.format in FOLDERS:
        raise PpclError("--pipeline: model folders are not compared with PyTorch; leave it out, or export onnx")
    for name, value in sampling.items():
        if value is not None and pipeline is None:
            raise PpclError(f"{name}: a sampling run needs the teacher's pipeline; give --pipeline MODEL")
    if calls is None:
        if config.weights != "stored":
            raise PpclError(f"--weights {config.weights}: {ROUNDED_FOR_CALLS}")
        common.refuse(config, ["check_calls"], "there are no recorded calls; give --calls, or leave it out")
    if pipeline is None:
        common.refuse(config, ["sampling_tolerance"], "there is no sampling run; give --pipeline, or leave it out")


def _opened(
    student: Path, config: ExportConfig, terminal: Terminal, recorded: Recorded | None
) -> PluggableModel | StudentFolder | FinetunedFolder:
    """Return a fine-tuned model or a student with its weights on disk; in memory for folders, and released ones."""
    from ppcl_fx.model.pluggable import CARD
    from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder, is_finetuned

    if is_finetuned(student):
        with terminal.step("opening the fine-tuned model"):
            return FinetunedFolder.open(student)
    if config.format in FOLDERS or not (student / CARD).is_file():
        return common.open_student(student, terminal, recorded)
    with terminal.step("opening the student"):
        return StudentFolder.open(student)


def _open_sampling(name: str, student: Path, model: str, recorded: Recorded | None, terminal: Terminal) -> SamplingRun:
    """Open a pipeline and say what it may draw: prompts of the recorded calls, or the shipped model's own."""
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.model.sources import SHAPES, open_source

    source = open_source(name)
    if recorded is not None:
        texts = list(dict.fromkeys(text for call in recorded.calls.heads() for text in call.prompts))
    else:
        texts = shipped_prompts(source, SEED, f"--pipeline {name}: no prompts to draw; give recorded calls: --calls")
    pipeline = common.open_pipeline("--pipeline", source, student, model, terminal)
    pipeline.transformer = None  # the run puts others there, and its weights are in memory once more
    if source.name != SHAPES:
        return SamplingRun(pipeline, texts, SEED)
    from ppcl_fx.shapes.score import share_right

    return SamplingRun(pipeline, texts, SEED, score=share_right)


def _result(exported: ExportResult, config: ExportConfig, notes: list[str]) -> CommandResult:
    if config.format in FOLDERS:
        found = [
            {"keep": one.keep, "params": one.params, "plugged": list(one.plugged), "folder": str(one.folder)}
            for one in exported.folders
        ]
        lines = [f"{one.keep:<5g} {one.params:>14,}  {one.folder}" for one in exported.folders]
        return CommandResult({"format": config.format, "folders": found}, ["keep      parameters  folder", *lines])
    scores: list[str] = []
    lines = [f"{'keep':<5} {'parameters':>14} {'ms':>8}   difference  relative    cosine  sampling  file"]
    for ratio in exported.ratios:
        ms = "-" if ratio.latency_ms is None else f"{ratio.latency_ms:.2f}"
        largest = "unchecked" if ratio.parity_max_abs is None else f"{ratio.parity_max_abs:.2g}"
        calls, run = (ratio.gate.calls, ratio.gate.sampling) if ratio.gate is not None else (None, None)
        relative, cosine = (f"{calls.relative:.2g}", f"{calls.cosine:.6f}") if calls is not None else ("-", "-")
        sampled = "-" if run is None else f"{run.relative:.2g}"
        how = f"{ms:>8}   {largest:>10}  {relative:>8}  {cosine:>8}  {sampled:>8}"
        lines.append(f"{ratio.keep:<5g} {ratio.params:>14,} {how}  {ratio.engine or ratio.onnx}")
        if run is not None and run.score is not None:
            scores.append(f"{ratio.keep:g}: its pictures score {run.score:g}, and PyTorch's {run.score_pytorch:g}")
    lines += [*scores, *notes]
    if exported.script is not None:
        lines.append(f"build the engines with: sh {exported.script}")
    elif config.onnx_only:
        lines.append(f"build the engines with: ppcl-fx build {exported.folder}")
    elif exported.engines:
        lines += _engine_lines(exported.engines)
    return CommandResult(exported.to_json() | {"notes": notes}, lines)


def _engine_lines(engines: Sequence[Built]) -> list[str]:
    lines = ["keep            MiB   seconds  engine"]
    for one in engines:
        size = one.manifest.engine.bytes / 2**20
        more = "  (was there)" if one.kept else ""
        lines.append(f"{one.name:<10} {size:>8.1f}  {one.manifest.seconds:>8.1f}  {one.engine}{more}")
    return lines
