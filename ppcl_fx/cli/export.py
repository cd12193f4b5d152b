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

FORMATS = ("onnx", "tensorrt")


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
            "--format", metavar="NAME", help="'onnx', or 'tensorrt' for an engine beside each ONNX file."
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

    from ppcl_fx.export import export as run

    model = open_student(student, terminal)
    recorded = open_calls(calls, terminal) if calls is not None else None
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


def _result(exported: ExportResult) -> Result:
    lines = ["keep      parameters       ms   difference  file"]
    for ratio in exported.ratios:
        file = ratio.engine or ratio.onnx
        lines.append(
            f"{ratio.keep:<5g} {ratio.params:>14,} {ratio.latency_ms:>8.2f}   {ratio.parity_max_abs:>10.2g}  {file}"
        )
    return Result(exported.to_json(), lines)
