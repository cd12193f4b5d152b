"""The command line of ``trtexec`` that builds what `ppcl_fx.export.tensorrt.build_engine` builds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.store.names import TIMINGS
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import SCRIPT, GraphPlace, read_graph
from ppcl_fx.export.tensorrt.profiles import KINDS, Profile, shapes_of
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.files import write_text

HEAD = """#!/bin/sh
# Builds the engines of this folder with NVIDIA's trtexec, for the GPU of the machine it runs on.
# TensorRT 11 takes the types of the ONNX file by itself; TensorRT 10 is told to: TYPED=--stronglyTyped sh build.sh
# 'ppcl-fx build' does the same and writes what each engine is for beside it; only such engines are loaded by ppcl-fx.
set -eu
cd "$(dirname "$0")"
"""


def trtexec_arguments(
    onnx: str, engine: str, inputs: Sequence[Port], profiles: Sequence[Profile], options: BuildOptions, cache: str
) -> list[str]:
    """Return the arguments of ``trtexec`` for one engine.

    Args:
        onnx: path of the ONNX file.
        engine: path of the engine.
        inputs: the inputs of the ONNX file.
        profiles: the profiles.
        options: how to build.
        cache: path of the timing cache.

    Raises:
        PpclError: ``trtexec`` has no argument for an option.
    """
    if options.refitting == "identical" and not options.stripped:
        raise PpclError(
            "trtexec has no argument for --refit identical on an engine with weights; add --stripped, or build with "
            "'ppcl-fx build'"
        )
    arguments = [f"--onnx={onnx}", f"--saveEngine={engine}", "--skipInference", f"--timingCacheFile={cache}"]
    if options.workspace is not None:
        arguments.append(f"--memPoolSize=workspace:{options.workspace}B")
    if options.level is not None:
        arguments.append(f"--builderOptimizationLevel={options.level}")
    flags = {
        "--refit": options.refitting == "any",
        "--stripWeights": options.stripped,
        "--allowWeightStreaming": options.weight_streaming is not None,
    }
    arguments += [flag for flag, wanted in flags.items() if wanted]
    for index, profile in enumerate(profiles):
        shapes = {port.name: shapes_of(port, profile) for port in inputs if any(isinstance(s, str) for s in port.shape)}
        if shapes:
            arguments += [f"--profile={index}"] if len(profiles) > 1 else []
            arguments += [
                f"--{kind}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, one[kind]))}" for name, one in shapes.items())
                for kind in KINDS
            ]
    return arguments


def write_script(places: Sequence[GraphPlace], request: BuildConfig) -> Path:
    """Write ``build.sh``, which builds the engines of a folder with ``trtexec``, and return its path.

    Args:
        places: the graphs, of one folder.
        request: what to build.

    Raises:
        PpclError: a profile does not fit a graph, or ``trtexec`` has no argument for an option.
    """
    root = places[0].root
    blocks = []
    for place in places:
        graph = read_graph(place.onnx)
        engine = place.engine.relative_to(root).as_posix()
        arguments = trtexec_arguments(
            place.onnx.relative_to(root).as_posix(),
            f"{engine}.partial",
            graph.inputs,
            request.profiles(graph, str(place.onnx)),
            request.options,
            TIMINGS,
        )
        lines = " \\\n    ".join(shlex.quote(argument) for argument in arguments)
        move = f"mv {shlex.quote(engine + '.partial')} {shlex.quote(engine)}"
        blocks.append(f"trtexec ${{TYPED-}} \\\n    {lines}\n{move}\n")
    path = root / SCRIPT
    write_text(path, HEAD + "\n" + "\n".join(blocks))
    return path
