"""The command line of ``trtexec`` that builds what `ppcl_fx.export.tensorrt.build.build_engine` builds."""

from __future__ import annotations

import shlex
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.names import TIMINGS, engine_path
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import KINDS, shapes_of
from ppcl_fx.export.tensorrt.request import BuildConfig, find_graphs, read_graph
from ppcl_fx.io.files import write_text

SCRIPT = "build.sh"
HEAD = """#!/bin/sh
# Builds the engines of this folder with NVIDIA's trtexec, for the GPU of the machine it runs on.
# TensorRT 11 takes the types of the ONNX file by itself; TensorRT 10 is told to: TYPED=--stronglyTyped sh build.sh
# 'ppcl-fx build' does the same and writes what each engine is for beside it; only such engines are loaded by ppcl-fx.
set -eu
cd "$(dirname "$0")"
"""


def write_script(folder: Path, config: BuildConfig) -> Path:
    """Write ``build.sh``, which builds the engines of a folder with ``trtexec``, and return its path."""
    built_how = _options(config.options)
    blocks = []
    for onnx in find_graphs(folder).values():
        engine = engine_path(onnx).name
        arguments = [f"--onnx={onnx.name}", f"--saveEngine={engine}.partial", *built_how, *_shapes(onnx, config)]
        lines = " \\\n    ".join(shlex.quote(argument) for argument in arguments)
        move = f"mv {shlex.quote(engine + '.partial')} {shlex.quote(engine)}"
        blocks.append(f"trtexec ${{TYPED-}} \\\n    {lines}\n{move}\n")
    write_text(folder / SCRIPT, HEAD + "\n" + "\n".join(blocks))
    return folder / SCRIPT


def _options(options: BuildOptions) -> list[str]:
    if options.refitting == "identical" and not options.stripped:
        raise PpclError(
            "trtexec has no argument for --refit identical on an engine with weights; add --stripped, or build with "
            "'ppcl-fx build'"
        )
    arguments = {
        "--skipInference": True,
        f"--timingCacheFile={TIMINGS}": True,
        f"--memPoolSize=workspace:{options.workspace}B": options.workspace is not None,
        f"--builderOptimizationLevel={options.level}": options.level is not None,
        "--refit": options.refitting == "any",
        "--stripWeights": options.stripped,
        "--allowWeightStreaming": options.weight_streaming is not None,
    }
    return [argument for argument, wanted in arguments.items() if wanted]


def _shapes(onnx: Path, config: BuildConfig) -> list[str]:
    """Return the smallest, best and largest shape of each input that has open sizes, for each profile."""
    profiles = config.profiles(onnx)
    ports = [port for port in read_graph(onnx).inputs if any(isinstance(size, str) for size in port.shape)]
    arguments = []
    for index, profile in enumerate(profiles if ports else ()):
        shapes = {port.name: shapes_of(port, profile) for port in ports}
        arguments += [f"--profile={index}"] if len(profiles) > 1 else []
        arguments += [
            f"--{kind}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, one[kind]))}" for name, one in shapes.items())
            for kind in KINDS
        ]
    return arguments
