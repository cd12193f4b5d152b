"""`ppcl-fx analyze`: record what the transformer is called with, and find which of its blocks can go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli import options as common
from ppcl_fx.cli.boundary import CommandResult
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import Model, Overwrite
from ppcl_fx.cli.terminal import Terminal, quiet_diffusers
from ppcl_fx.errors import PpclError, foreign
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.reading import read_text
from ppcl_fx.model.sources import check_source
from ppcl_fx.passes.options import AnalyzeConfig

if TYPE_CHECKING:
    from torch import nn

    from ppcl_fx.calls.store import Calls
    from ppcl_fx.model.sources import Source
    from ppcl_fx.schema.analysis import Redundancy

CALLS, ANALYSIS, REPORT, WORK = "calls", "analysis.json", "report.html", "unfinished"
SHIPPED_PROMPTS = 8
"""Prompts of each category that are recorded for the shipped model when none are given."""


@flagged
def analyze(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Folder for calls, analysis and report.")],
    config: AnalyzeConfig,
    terminal: Terminal,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to record, one a line; 'shapes' has its own.")
    ] = None,
    calls: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Use these recorded calls instead of recording.")
    ] = None,
    overwrite: Overwrite = False,
) -> CommandResult:
    """Record MODEL's calls and analyse its redundancy: RUN/calls, RUN/analysis.json, RUN/report.html.

    With --memory-limit the model is never loaded: all calls go through one block, then through the next. What does
    not fit in memory goes to RUN/unfinished; the same command goes on from there after a kill.
    """
    if prompts is not None and calls is not None:
        raise PpclError("--prompts, --calls: recorded calls need no prompts; give one of the two")
    if calls is not None:
        common.refuse(config, ("batch_size", "steps", "seed"), "nothing is recorded with --calls; leave it out")
    common.check_device(config.device, config.memory_limit is not None)
    if config.memory_limit is not None and calls is None:
        raise PpclError("--memory-limit: the model is never loaded, so nothing can be recorded; give --calls FOLDER")
    _check_out(out, calls is None, overwrite, [model, prompts, calls])
    check_source(model)
    common.check_folder(calls, "recorded calls", "index.json")
    texts = read_prompts(prompts) if prompts is not None else None

    import ppcl_fx
    from ppcl_fx.model.sources import open_source
    from ppcl_fx.report import write_report

    with terminal.step("loading the model"):
        source = open_source(model)
    if calls is not None and config.memory_limit is not None:
        recorded = common.open_calls(calls, terminal).calls
        checkpoint = common.open_checkpoint(model, terminal, {calls: recorded.model})
        from ppcl_fx.passes.analysis.analyze import calibration_on_disk, conclude
        from ppcl_fx.passes.calibration.run_store import MEMORY

        with terminal.step("analysing") as progress:
            calibration = calibration_on_disk(checkpoint, recorded, out / WORK, config, MEMORY, progress)
            analysis = conclude(calibration.run(), recorded, config.stream)
    else:
        if calls is None:
            transformer, recorded = _record(source, texts, config, terminal)
            recorded.save(out / CALLS, overwrite=overwrite)
        else:
            recorded = common.open_calls(calls, terminal).calls
            transformer = common.open_teacher(model, terminal, {calls: recorded.model})
        with terminal.step("tracing"):
            graph = ppcl_fx.trace(transformer, recorded.examples())
        with terminal.step("analysing") as progress:
            analysis = ppcl_fx.analyze(graph, recorded, config, progress=progress)
    analysis.save(out / ANALYSIS)
    # Not before the result is safe: a run killed in between goes on from here.
    owned.discard(out / WORK, owned.ANALYSING)
    write_report(out / REPORT, redundancy=analysis, title=f"{source.name}: analysis", provenance={"model": source.name})
    return _result(out, calls or out / CALLS, analysis)


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not empty."""
    # Not splitlines: it also cuts at U+2028 and the like, within a prompt.
    prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise PpclError(f"{path}: holds no prompt; write one a line")
    return prompts


def _check_out(out: Path, recording: bool, overwrite: bool, reads: Iterable[str | Path | None]) -> None:
    """Refuse a RUN that holds results already, or others' files in their place, or cannot be written."""
    common.check_output(out)
    for place in (out / CALLS, out / ANALYSIS, out / REPORT, out / WORK):
        owned.check_no_link(place)
    if recording:
        if (out / CALLS).exists() and not overwrite:
            raise PpclError(f"{out / CALLS}: already exists; use it with --calls {out / CALLS}, or give --overwrite")
        owned.check_replaceable(out / CALLS, owned.CALLS, [read for read in reads if read is not None])
    if (out / ANALYSIS).exists() and not overwrite:
        raise PpclError(f"{out / ANALYSIS}: already exists; choose another output, or give --overwrite")
    owned.check_file(out / ANALYSIS, keys=("stacks", "calls_used"))
    owned.check_file(out / REPORT, mark=owned.REPORT_MARK)
    owned.check_replaceable(out / WORK, owned.ANALYSING)


def _record(
    source: Source, texts: list[str] | None, config: AnalyzeConfig, terminal: Terminal
) -> tuple[nn.Module, Calls]:
    import ppcl_fx

    if source.kind != "pipeline":
        more = "give its whole pipeline, or --calls FOLDER"
        raise PpclError(f"{source.name}: a bare transformer draws no prompts; {more}")
    missing = f"{source.name}: no prompts to record; give --prompts FILE, one prompt a line"
    wanted = texts if texts is not None else shipped_prompts(source, config.seed, missing)
    with terminal.step("loading the pipeline"), quiet_diffusers():
        pipeline = source.pipeline()
    broken = foreign(f"{source.name}: its pipeline does not draw", "mend its files, or download it again")
    size, steps = config.batch_size, config.steps
    with broken, terminal.step(f"recording {len(wanted)} prompts") as progress:
        calls = ppcl_fx.record(
            pipeline, wanted, batch_size=size, num_inference_steps=steps, seed=config.seed, progress=progress
        )
    return pipeline.transformer, calls


def shipped_prompts(source: Source, seed: int, missing: str) -> list[str]:
    """Return the prompts that come with the shipped model."""
    from ppcl_fx.shapes.captions import CATEGORIES
    from ppcl_fx.shapes.captions import prompts as draw

    if source.name != "shapes":
        raise PpclError(missing)
    return [prompt.text for category in CATEGORIES for prompt in draw(category, SHIPPED_PROMPTS, seed)]


def _result(out: Path, calls: Path, analysis: Redundancy) -> CommandResult:
    found = {
        stack.name: [[interval.first, interval.last] for interval in stack.curves(analysis.stream).candidates]
        for stack in analysis.stacks
    }
    blocks = sum(len(stack.blocks) for stack in analysis.stacks)
    data = {
        "run": str(out),
        "calls": str(calls),
        "analysis": str(out / ANALYSIS),
        "report": str(out / REPORT),
        "model": analysis.model,
        "params": analysis.teacher_params,
        "blocks": blocks,
        **{name: getattr(analysis, name) for name in ("calls_used", "held_out", "few", "stream")},
        "candidates": found,
    }
    lines = [f"{analysis.teacher_params:,} parameters in {blocks} blocks, {analysis.calls_used} calls"]
    for name, intervals in found.items():
        listed = ", ".join(f"{first}-{last}" for first, last in intervals) or "none"
        lines.append(f"{name}: candidate intervals {listed}")
    return CommandResult(data, [*lines, f"report: {out / REPORT}"])
