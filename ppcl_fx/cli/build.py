"""`ppcl-fx build`: TensorRT engines for graphs that were exported here or on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ppcl_fx.cli import engine_options as on
from ppcl_fx.cli.boundary import Result
from ppcl_fx.cli.options import Json, Overwrite, Verbose, check_folder
from ppcl_fx.cli.terminal import Terminal

if TYPE_CHECKING:
    from ppcl_fx.export.tensorrt.request import BuildRequest


def build(
    folder: Annotated[Path, typer.Argument(metavar="ENGINES", help="What 'ppcl-fx export' wrote.")],
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
    """Build a TensorRT engine for each graph in ENGINES, for the GPU of this machine.

    What is not said here is taken from ENGINES/build.json, which 'ppcl-fx export --onnx-only' wrote.
    """
    check_folder(folder, "what 'ppcl-fx export' wrote")
    from ppcl_fx.export.tensorrt.request import read_request

    request = on.request_from(
        read_request(folder),
        shapes=shapes,
        tokens=tokens,
        batch=batch,
        text=text,
        size=size,
        pixels_per_token=pixels_per_token,
        workspace=workspace,
        level=level,
        refit=refit,
        stripped=stripped,
        weight_streaming=weight_streaming,
    )
    return built(folder, request, overwrite, Terminal(verbose))


def built(folder: Path, request: BuildRequest, overwrite: bool, terminal: Terminal) -> Result:
    """Build the engines of a folder and say what was built."""
    from ppcl_fx.export.tensorrt.folder import build_folder
    from ppcl_fx.export.tensorrt.request import write_request

    with terminal.step("building engines") as report:
        engines = build_folder(folder, request, overwrite=overwrite, report=report)
    write_request(folder, request)
    lines = ["keep            MiB   seconds  engine"]
    for one in engines:
        size = one.card.engine.bytes / 2**20
        more = "  (was there)" if one.kept else ""
        lines.append(f"{one.name:<10} {size:>8.1f}  {one.card.seconds:>8.1f}  {one.engine}{more}")
    lines += [f"not checked: {what}" for what in dict.fromkeys(w for one in engines for w in one.card.not_checked)]
    return Result({"folder": str(folder), "engines": [one.to_json() for one in engines]}, lines)
