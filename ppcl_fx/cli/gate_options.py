"""The options of `export` that say what its files are compared with PyTorch on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli.analyze import shipped_prompts
from ppcl_fx.cli.options import MOST, MOST_STEPS
from ppcl_fx.cli.teacher import Recorded, open_pipeline
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError

if TYPE_CHECKING:
    from ppcl_fx.export.sampling import SamplingRun

PANEL = "Comparing with PyTorch"
SAMPLES = 2
"""Pictures of a sampling run, if nothing else is said."""
SEED = 42
"""Of the first picture's noise, as when calls are recorded."""

Tolerance = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1e6,
        rich_help_panel=PANEL,
        help="Largest difference on the shapes and largest relative error on a recorded call that are allowed.",
    ),
]
CheckCalls = Annotated[
    int,
    typer.Option(
        "--check-calls", min=0, max=MOST, metavar="N", rich_help_panel=PANEL, help="Recorded calls to compare."
    ),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        metavar="MODEL",
        rich_help_panel=PANEL,
        help="The teacher's pipeline: compare whole sampling runs, with prompts of the recorded calls.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, max=MOST, metavar="N", rich_help_panel=PANEL, help=f"Pictures of that run; {SAMPLES}."
    ),
]
SampleSteps = Annotated[
    int | None,
    typer.Option(
        "--sample-steps",
        min=1,
        max=MOST_STEPS,
        metavar="N",
        rich_help_panel=PANEL,
        help="Denoising steps of that run; the pipeline's own number if left out.",
    ),
]
SamplingTolerance = Annotated[
    float,
    typer.Option(
        "--sampling-tolerance",
        min=0.0,
        max=1e6,
        rich_help_panel=PANEL,
        help="Largest relative error of that run's results.",
    ),
]


def check_sampling(pipeline: str | None, samples: int | None, steps: int | None, wanted: bool) -> None:
    """Refuse options of a sampling run where there is none, before any long work.

    Args:
        pipeline: the pipeline's name.
        samples: the pictures asked for.
        steps: the steps asked for.
        wanted: whether the format is one that is compared.

    Raises:
        PpclError: an option has no use.
    """
    if pipeline is not None and not wanted:
        raise PpclError("--pipeline: model folders are not compared with PyTorch; leave it out, or export onnx")
    for name, value in (("--samples", samples), ("--sample-steps", steps)):
        if value is not None and pipeline is None:
            raise PpclError(f"{name}: a sampling run needs the teacher's pipeline; give --pipeline MODEL")


def open_sampling(
    name: str,
    samples: int | None,
    steps: int | None,
    student: Path,
    model: str,
    recorded: Recorded | None,
    terminal: Terminal,
) -> SamplingRun:
    """Open a pipeline and say what it is to draw: prompts of the recorded calls, or the shipped model's own.

    Args:
        name: MODEL, as it was typed.
        samples: pictures; `SAMPLES` when None. Fewer where there are fewer prompts.
        steps: denoising steps; the pipeline's own number when None.
        student: the student's folder, for messages.
        model: fingerprint of its teacher.
        recorded: the recorded calls.
        terminal: where to show what is going on.

    Raises:
        PpclError: there is no such pipeline, it is not the teacher's, or there are no prompts.
    """
    from ppcl_fx.export.sampling import SamplingRun
    from ppcl_fx.sources import SHAPES, open_source

    source = open_source(name)
    if recorded is not None:
        texts = list(dict.fromkeys(text for call in recorded.calls.heads() for text in call.prompts))
    else:
        texts = shipped_prompts(source, SEED, f"--pipeline {name}: no prompts to draw; give recorded calls: --calls")
    pipeline = open_pipeline("--pipeline", source, student, model, terminal)
    pipeline.transformer = None  # the run puts others there, and its weights are in memory once more
    run = SamplingRun(pipeline, texts[: samples or SAMPLES], SEED, steps)
    if source.name != SHAPES:
        return run
    from ppcl_fx.shapes.score import share_right

    return replace(run, score=share_right)
