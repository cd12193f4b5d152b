"""`ppcl-fx export`: one file for each ratio, checked against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, Overwrite, Verbose, check_output, choice, parse_keeps
from ppcl_fx.cli.teacher import open_calls, open_student
from ppcl_fx.cli.terminal import Terminal

if TYPE_CHECKING:
    from ppcl_fx.export import ExportResult
    from ppcl_fx.model import PluggableModel

FORMATS = ("onnx", "tensorrt", "diffusers", "released")
FOLDERS = ("diffusers", "released")
"""Formats that are model folders; they need neither onnxruntime nor calls."""


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
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference to PyTorch that is allowed, in float32.")
    ] = 1e-4,
    runs: Annotated[int, typer.Option(min=1, help="Runs timed for the latency.")] = 10,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
    json: Json = False,
) -> Result:
    """Export STUDENT once for each share: ENGINES/keep-0.5/transformer.onnx and so on."""
    keeps = parse_keeps(keep)
    choice("--format", format, FORMATS)
    check_output(out, overwrite=overwrite)
    terminal = Terminal(verbose)

    if format in FOLDERS:
        return _folders(open_student(student, terminal), keeps, out, format, overwrite, terminal)

    from ppcl_fx.export import export as run

    recorded = open_calls(calls, terminal) if calls is not None else None
    model = open_student(student, terminal, recorded)
    if recorded is not None:
        recorded.check(student, model.plan.model)
    with terminal.step(f"exporting {len(keeps)} ratios") as progress:
        exported = run(
            model,
            keeps,
            out,
            format=cast(Literal["onnx", "tensorrt"], format),
            calls=recorded.calls if recorded is not None else None,
            tolerance=tolerance,
            runs=runs,
            overwrite=overwrite,
            progress=progress,
        )
    return _result(exported)


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


def _result(exported: ExportResult) -> Result:
    lines = ["keep      parameters       ms   difference  file"]
    for ratio in exported.ratios:
        file = ratio.engine or ratio.onnx
        lines.append(
            f"{ratio.keep:<5g} {ratio.params:>14,} {ratio.latency_ms:>8.2f}   {ratio.parity_max_abs:>10.2g}  {file}"
        )
    return Result(exported.to_json(), lines)
