"""`ppcl-fx export`: one small graph for each ratio over shared weights, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppcl_fx.cli import engine_options as on
from ppcl_fx.cli import gate_options as against
from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import (
    MOST,
    Json,
    MemoryLimit,
    Overwrite,
    Verbose,
    check_folder,
    check_output,
    choice,
    parse_keeps,
    refuse_given,
)
from ppcl_fx.cli.teacher import Recorded, open_calls, open_student
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.errors import PpclError
from ppcl_fx.memory import parse_size
from ppcl_fx.owned import PRUNED_RATIOS, SAVED
from ppcl_fx.sources import check_source

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export import ExportResult
    from ppcl_fx.export.tensorrt.request import BuildRequest
    from ppcl_fx.export.tuned import TunedFolder
    from ppcl_fx.export.weight_source import WeightFolder
    from ppcl_fx.model import PluggableModel

FORMATS = ("onnx", "tensorrt", "trtexec", "diffusers", "released")
ENGINES = ("tensorrt", "trtexec")
"""Formats that TensorRT engines are built from."""
FOLDERS = ("diffusers", "released")
"""Formats that are model folders; they need neither onnxruntime nor calls."""

DTYPES = ("stored", "fp32", "bf16", "fp16")
COMPARING = ("tolerance", "check_calls", "sampling_tolerance", "runs")
KEEPS = "1.0,0.7,0.6,0.5"


def export(
    context: typer.Context,
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT",
            help="What 'ppcl-fx rewrite' or 'train' wrote; STUDENT/finetuned is the fine-tuned model.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="ENGINES", help="Folder for the exported files.")
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help=f"Shares of the parameters that stay, with commas; one file each. {KEEPS} if left out.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="'onnx', 'tensorrt' for an engine beside each ONNX file, 'trtexec' for a script that builds them, "
            "'diffusers' for folders that diffusers loads "
            "by itself (depth edits alone), or 'released' for the layout of the paper's checkpoints.",
        ),
    ] = "onnx",
    calls: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Recorded calls to check with; random inputs if left out."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Type of the weights: 'stored', 'fp32', 'bf16' or 'fp16'. Another one than they are stored in costs "
            "one converted copy of them. 'fp16' needs --calls, and is refused where they come near its range.",
        ),
    ] = "stored",
    embed: Annotated[
        bool, typer.Option("--embed", help="Write ordinary files that hold their weights, a copy for each share.")
    ] = False,
    memory_limit: MemoryLimit = None,
    tolerance: against.Tolerance = 1e-4,
    check_calls: against.CheckCalls = 8,
    pipeline: against.Pipeline = None,
    samples: against.Samples = None,
    sample_steps: against.SampleSteps = None,
    sampling_tolerance: against.SamplingTolerance = 1e-3,
    runs: Annotated[int, typer.Option(min=1, max=MOST, help="Runs timed for the latency.")] = 10,
    onnx_only: Annotated[
        bool,
        typer.Option(
            "--onnx-only",
            rich_help_panel=on.PANEL,
            help="Build no engine; 'ppcl-fx build ENGINES' does so, on another machine perhaps.",
        ),
    ] = False,
    shapes: on.Shapes = None,
    tokens: on.Tokens = None,
    batch: on.Batch = None,
    text: on.Text = None,
    size: on.Size = None,
    pixels_per_token: on.PixelsPerToken = None,
    workspace: on.Workspace = None,
    level: on.Level = None,
    refit: on.Refit = None,
    stripped: on.Stripped = False,
    weight_streaming: on.WeightStreaming = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Export STUDENT once for each share: ENGINES/keep-0.5.onnx and so on.

    Where ENGINES is STUDENT or a folder above it, the weights stay where they are. 'export STUDENT/finetuned' exports
    the fine-tuned model, as one file.
    """
    keeps = parse_keeps(keep if keep is not None else KEEPS)
    choice("--format", format, FORMATS)
    choice("--dtype", dtype, DTYPES)
    limit = parse_size("--memory-limit", memory_limit) if memory_limit is not None else None
    terminal = Terminal(verbose)
    wanted = {
        "shapes": shapes,
        "tokens": tokens,
        "batch": batch,
        "text": text,
        "size": size,
        "pixels_per_token": pixels_per_token,
        "workspace": workspace,
        "level": level,
        "refit": refit,
        "stripped": stripped,
        "weight_streaming": weight_streaming,
    }
    request = _request(format, onnx_only, wanted)
    against.check_sampling(pipeline, samples, sample_steps, format not in FOLDERS)
    if format in FOLDERS:
        refuse_given(context, COMPARING, "model folders are not compared with PyTorch; leave it out, or export onnx")
        refuse_given(context, ("dtype", "embed", "memory_limit"), f"not for --format {format}; leave it out")
    if calls is None:
        refuse_given(context, ("check_calls",), "there are no recorded calls; give --calls, or leave it out")
    if pipeline is None:
        refuse_given(context, ("sampling_tolerance",), "there is no sampling run; give --pipeline, or leave it out")
    if format in FOLDERS:
        check_output(out, kind=PRUNED_RATIOS, overwrite=overwrite, reads=[student])
    else:
        check_output(out)  # other ratios may be there: what is refused is a graph of the same name
    if pipeline is not None:
        check_source(pipeline)
    # In a student there are fine-tuned models alone, and a missing one has a line of its own.
    if not (student.parent / str(SAVED.manifest)).is_file():
        check_folder(student, "what 'ppcl-fx rewrite' wrote")
    check_folder(calls, "recorded calls", "index.json")

    tuned = _finetuned(student, keep, format, terminal)

    if format in FOLDERS:
        return _folders(open_student(student, terminal), keeps, out, format, overwrite, terminal)

    from ppcl_fx.export.exporting import DTYPES as types
    from ppcl_fx.export.exporting import export as run
    from ppcl_fx.export.gate import GateOptions
    from ppcl_fx.export.opened import MEMORY, stays_on_disk
    from ppcl_fx.export.tuned import export_finetuned

    recorded = open_calls(calls, terminal) if calls is not None else None
    notes: list[str] = []
    how: dict[str, Any] = {
        "calls": recorded.calls if recorded is not None else None,
        "dtype": types[dtype],
        "embed": embed,
        "memory_limit": limit or MEMORY,
        "tolerance": tolerance,
        "check_calls": check_calls,
        "sampling_tolerance": sampling_tolerance,
        "runs": runs,
        "overwrite": overwrite,
        "note": notes.append,
    }
    if tuned is not None:
        if recorded is not None:
            recorded.check(student, tuned.model.plan.model)
        if pipeline is not None:
            model_name = tuned.model.plan.model
            how["sampling"] = against.open_sampling(
                pipeline, samples, sample_steps, student, model_name, recorded, terminal
            )
        with terminal.step("exporting the fine-tuned model") as progress:
            return _result(export_finetuned(tuned, out, progress=progress, **how), notes)
    model, name = _opened(student, terminal, recorded)
    if recorded is not None:
        recorded.check(student, name)
    if pipeline is not None and not stays_on_disk(model, limit or MEMORY, types[dtype]):
        how["sampling"] = against.open_sampling(pipeline, samples, sample_steps, student, name, recorded, terminal)
    with terminal.step(f"exporting {len(keeps)} ratios") as progress:
        exported = run(model, keeps, out, progress=progress, **how)
    if request is None:
        return _result(exported, notes)
    used = recorded.calls if recorded is not None else None
    gate = GateOptions(check_calls, how.get("sampling"), sampling_tolerance)
    checks = {"memory_limit": limit or MEMORY, "tolerance": tolerance, "gate": gate}
    return _engines(model, exported, used, request, checks, format, onnx_only, notes, terminal)


def _request(format: str, onnx_only: bool, wanted: dict[str, Any]) -> BuildRequest | None:
    """Return what engines are asked for, before any long work; none for other formats."""
    named = [name for name, value in {"onnx_only": onnx_only, **wanted}.items() if value not in (None, False)]
    if format not in ENGINES:
        if named:
            option = f"--{named[0].replace('_', '-')}"
            raise PpclError(f"{option}: only for --format {' or '.join(ENGINES)}; leave it out, or name that format")
        return None
    from ppcl_fx.export.tensorrt.request import BuildRequest

    return on.request_from(BuildRequest(), **wanted)


def _engines(
    model: PluggableModel | WeightFolder,
    exported: ExportResult,
    calls: Calls | None,
    request: BuildRequest,
    checks: dict[str, Any],
    format: str,
    onnx_only: bool,
    notes: list[str],
    terminal: Terminal,
) -> Result:
    """Write the graphs in the engines' type and what to build from them; then build, here and now if that is wanted."""
    from ppcl_fx.cli.build import built
    from ppcl_fx.export.engines import write_typed
    from ppcl_fx.export.tensorrt.places import find_graphs, read_graph
    from ppcl_fx.export.tensorrt.request import write_request
    from ppcl_fx.export.tensorrt.trtexec import write_script

    with terminal.step("writing bfloat16 graphs"):
        example = write_typed(model, exported.ratios, calls, request, note=notes.append, **checks)
    request = request.model_copy(update={"example": example})
    places = find_graphs(exported.folder)
    for place in places:
        request.profiles(read_graph(place.onnx), str(place.onnx))
    write_request(exported.folder, request)
    result = _result(exported, notes)
    if format == "trtexec":
        script = write_script(places, request)
        return Result(result.data | {"script": str(script)}, [*result.lines, f"build the engines with: sh {script}"])
    if onnx_only:
        return Result(result.data, [*result.lines, f"build the engines with: ppcl-fx build {exported.folder}"])
    engines = built(exported.folder, request, True, terminal)
    return Result(result.data | engines.data, [*result.lines, *engines.lines])


def _finetuned(student: Path, keep: str | None, format: str, terminal: Terminal) -> TunedFolder | None:
    """Return the fine-tuned model in a folder; None where the folder is not for one."""
    from ppcl_fx.train.finetuned import FinetunedFolder, is_finetuned

    if not is_finetuned(student):
        return None
    if keep is not None:
        raise PpclError(f"--keep {keep}: {student} is a fine-tuned model, which has one size; leave it out")
    if format in ENGINES:
        raise PpclError(
            f"--format {format}: not for a fine-tuned model; export it with --dtype bf16, and then run "
            "'ppcl-fx build' on the result"
        )
    if format in FOLDERS:
        raise PpclError(f"--format {format}: not for a fine-tuned model; leave it out, or export {student.parent}")
    with terminal.step("opening the fine-tuned model"):
        return FinetunedFolder.open(student)


def _opened(
    student: Path, terminal: Terminal, recorded: Recorded | None
) -> tuple[PluggableModel | WeightFolder, str]:
    """Return a student with its weights on disk, or a released checkpoint in memory; and its teacher's fingerprint."""
    from ppcl_fx.model import CARD
    from ppcl_fx.train.bounded.folder import StudentFolder

    if not (student / CARD).is_file():
        loaded = open_student(student, terminal, recorded)
        return loaded, loaded.plan.model
    with terminal.step("opening the student"):
        opened = StudentFolder.open(student)
    return opened, opened.model.plan.model


def _folders(
    model: PluggableModel, keeps: list[float], out: Path, format: str, overwrite: bool, terminal: Terminal
) -> Result:
    """Write a model folder for each share: OUT/keep-0.5 and so on, all or none."""
    from ppcl_fx.files import new_folder
    from ppcl_fx.folders.released import save_released
    from ppcl_fx.folders.stock import save_stock

    write = save_stock if format == "diffusers" else save_released
    found = []
    replaces = PRUNED_RATIOS if overwrite else None
    with new_folder(out, replaces=replaces) as beside, terminal.step(f"writing {len(keeps)} folders") as progress:
        mixtures = [(keep, model.plug(keep=keep).students) for keep in keeps]
        for done, (keep, students) in enumerate(mixtures, start=1):
            name = f"keep-{keep:g}"
            write(model.plug(students=students), beside / name)
            found.append(
                {"keep": keep, "params": model.param_count(), "plugged": list(students), "folder": str(out / name)}
            )
            progress(done, len(keeps))
    lines = [f"{one['keep']:<5g} {one['params']:>14,}  {one['folder']}" for one in found]
    return Result({"format": format, "folders": found}, ["keep      parameters  folder", *lines])


def _result(exported: ExportResult, notes: list[str]) -> Result:
    lines = [f"{'keep':<5} {'parameters':>14} {'ms':>8}   difference  relative    cosine  sampling  file"]
    for ratio in exported.ratios:
        ms = "-" if ratio.latency_ms is None else f"{ratio.latency_ms:.2f}"
        largest = "unchecked" if ratio.parity_max_abs is None else f"{ratio.parity_max_abs:.2g}"
        calls, run = (ratio.gate.calls, ratio.gate.sampling) if ratio.gate is not None else (None, None)
        relative, cosine = (f"{calls.relative:.2g}", f"{calls.cosine:.6f}") if calls is not None else ("-", "-")
        sampled = "-" if run is None else f"{run.relative:.2g}"
        lines.append(
            f"{ratio.keep:<5g} {ratio.params:>14,} {ms:>8}   {largest:>10}  {relative:>8}  {cosine:>8}  {sampled:>8}  "
            f"{ratio.engine or ratio.onnx}"
        )
    scores = [
        f"{ratio.keep:g}: its pictures score {run.score:g}, and PyTorch's {run.score_pytorch:g}"
        for ratio in exported.ratios
        if ratio.gate and (run := ratio.gate.sampling) and run.score is not None
    ]
    return Result(exported.to_json() | {"notes": notes}, [*lines, *scores, *notes])
