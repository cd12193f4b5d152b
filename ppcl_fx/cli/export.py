"""`ppcl-fx export`: one small graph for each ratio over shared weights, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, MemoryLimit, Overwrite, Verbose, check_output, choice, parse_keeps
from ppcl_fx.cli.teacher import Recorded, open_calls, open_student
from ppcl_fx.cli.terminal import Terminal
from ppcl_fx.files import check_writable
from ppcl_fx.memory import parse_size

if TYPE_CHECKING:
    from ppcl_fx.export import ExportResult
    from ppcl_fx.export.weight_source import WeightFolder
    from ppcl_fx.model import PluggableModel

FORMATS = ("onnx", "tensorrt", "diffusers", "released")
FOLDERS = ("diffusers", "released")
"""Formats that are model folders; they need neither onnxruntime nor calls."""

DTYPES = ("stored", "fp32", "bf16", "fp16")


def export(
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT", help="What 'ppcl-fx rewrite' or 'train' wrote.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="ENGINES", help="Folder for the exported files.")
    ],
    keep: Annotated[
        str,
        typer.Option(
            metavar="SHARES", help="Shares of the parameters that stay, with commas; one file each."
        ),
    ] = "1.0,0.7,0.6,0.5",
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="'onnx', 'tensorrt' for an engine beside each ONNX file, 'diffusers' for folders that diffusers loads "
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
            "one converted copy of them."
        ),
    ] = "stored",
    embed: Annotated[
        bool, typer.Option("--embed", help="Write ordinary files that hold their weights, a copy for each share.")
    ] = False,
    memory_limit: MemoryLimit = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference to PyTorch that is allowed.")
    ] = 1e-4,
    runs: Annotated[int, typer.Option(min=1, help="Runs timed for the latency.")] = 10,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Export STUDENT once for each share: ENGINES/keep-0.5.onnx and so on.

    Where ENGINES is STUDENT or a folder above it, the weights stay where they are.
    """
    keeps = parse_keeps(keep)
    choice("--format", format, FORMATS)
    choice("--dtype", dtype, DTYPES)
    limit = parse_size("--memory-limit", memory_limit) if memory_limit is not None else None
    terminal = Terminal(verbose)

    if format in FOLDERS:
        check_output(out, overwrite=overwrite)
        return _folders(open_student(student, terminal), keeps, out, format, overwrite, terminal)

    from ppcl_fx.export import export as run
    from ppcl_fx.export.exporting import DTYPES as types
    from ppcl_fx.export.opened import MEMORY

    check_writable(out)
    recorded = open_calls(calls, terminal) if calls is not None else None
    model, name = _opened(student, terminal, recorded)
    if recorded is not None:
        recorded.check(student, name)
    notes: list[str] = []
    with terminal.step(f"exporting {len(keeps)} ratios") as progress:
        exported = run(
            model,
            keeps,
            out,
            format=cast(Literal["onnx", "tensorrt"], format),
            calls=recorded.calls if recorded is not None else None,
            dtype=types[dtype],
            embed=embed,
            memory_limit=limit or MEMORY,
            tolerance=tolerance,
            runs=runs,
            overwrite=overwrite,
            progress=progress,
            note=notes.append,
        )
    return _result(exported, notes)


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
    with new_folder(out, overwrite=overwrite) as beside, terminal.step(f"writing {len(keeps)} folders") as progress:
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
    lines = ["keep      parameters       ms   difference  file"]
    for ratio in exported.ratios:
        file = ratio.engine or ratio.onnx
        ms = "-" if ratio.latency_ms is None else f"{ratio.latency_ms:.2f}"
        largest = "unchecked" if ratio.parity_max_abs is None else f"{ratio.parity_max_abs:.2g}"
        lines.append(f"{ratio.keep:<5g} {ratio.params:>14,} {ms:>8}   {largest:>10}  {file}")
    return Result(exported.to_json() | {"notes": notes}, [*lines, *notes])
