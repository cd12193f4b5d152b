"""Build an engine from an ONNX file: what its options need of a library, and the engine's manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import mark_of
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.compiling import Compiled, Job, compile_graph
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor, Report, silent, stoppable
from ppcl_fx.export.tensorrt.options import PORTABLE, BuildOptions
from ppcl_fx.export.tensorrt.process import compile_apart
from ppcl_fx.export.tensorrt.profiles import Profile, shapes_of
from ppcl_fx.export.tensorrt.request import Origin, read_graph
from ppcl_fx.export.tensorrt_api import Api, version_numbers
from ppcl_fx.io.files import inside, need_room, new_file, write_json

OLDEST = (10, 15)
"""The oldest version that is supported: its parser knows Attention (from 10.14 on), RotaryEmbedding and
RMSNormalization (from 10.15 on)."""

REFIT_DROPS_BIAS = ((11, 3), (11, 4))
"""From the first version up to the second, not included, REFIT can lose the bias of a matrix product, even if no weight
is ever exchanged (NVIDIA's release notes of 11.3, known issues). REFIT_IDENTICAL does not."""


def build_engine(
    onnx: Path,
    engine: Path,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    *,
    api: Api,
    cache: Path | None = None,
    origin: Origin | None = None,
    report: Report = silent,
) -> EngineManifest:
    """Build an engine, in a process of its own, and write it, its manifest, and the timing cache.

    Args:
        onnx: the ONNX file; its types are the engine's types.
        engine: where the engine goes, in the same folder; the manifest beside it gets the suffix ``.json``.
        profiles: ranges for its open sizes, one set of them or several.
        api: the library that builds.
        cache: the timing cache; read if it exists, then replaced, also after a build that was stopped. TensorRT for RTX
            has none.
        origin: where the graph comes from, for the manifest.
        report: told how far the build is.

    Raises:
        PpclError: the library is too old or does not do what the options ask for, its parser or builder refuses the
            model or ends by itself, the profiles do not fit, or the disk or the memory is full.
    """
    started = time.perf_counter()
    options, origin = options or BuildOptions(), origin or Origin()
    check_library(api, options)
    graph = read_graph(onnx)
    if not profiles:
        raise PpclError(f"{onnx.name}: an engine needs at least one profile; give --shapes, --batch and --text")
    shapes = [{port.name: shapes_of(port, profile) for port in graph.inputs} for profile in profiles]
    weights = {name: mark_of(inside(onnx.parent, name)) for name in graph.weights}
    need_room(engine.parent, 0 if options.stripped else sum(mark.bytes for mark in weights.values()))
    cache = None if api.kind == "rtx" else cache
    with new_file(engine) as beside:
        job = Job(
            kind=api.kind,
            onnx=str(onnx),
            plan=str(beside),
            shapes=shapes,
            options=options,
            cache=None if cache is None else str(cache),
        )
        done = compile_apart(job, report) if api.separate else _compile_here(api, job, report)
        engine_manifest_path(engine).unlink(missing_ok=True)  # of the engine that is replaced: never beside this one
    manifest = EngineManifest(
        file=engine.name,
        engine=mark_of(engine),
        onnx=onnx.name,
        graph=mark_of(onnx),
        weights=weights,
        dtype=graph.dtype,
        keep=origin.keep,
        students=origin.students,
        plan=origin.plan,
        library=api.kind,
        tensorrt=api.version,
        cuda=None if api.gpu is None else api.gpu.cuda,
        gpu=None if api.gpu is None else api.gpu.name,
        capability=None if api.gpu is None else api.gpu.capability,
        capabilities=list(options.gpu or PORTABLE) if api.kind == "rtx" else [],
        profiles=list(profiles),
        options=options,
        inputs=graph.inputs,
        outputs=graph.outputs,
        timing_cache=None if cache is None else os.path.relpath(cache, engine.parent),
        graph_parity=origin.parity,
        layers=done.layers,
        peak_memory=done.peak_memory,
        seconds=time.perf_counter() - started,
    )
    write_json(engine_manifest_path(engine), manifest)
    return manifest


def _compile_here(api: Api, job: Job, report: Report) -> Compiled:
    monitor = Monitor(report)
    return stoppable(lambda: compile_graph(api, job, monitor, Messages(api)), monitor.stop.set)


def check_library(api: Api, options: BuildOptions) -> None:
    """Raise `PpclError` for a version that is too old, or a library that does not do, or does wrong, what is asked."""
    options.check(api.kind)
    if api.kind == "tensorrt":
        check_version(api.version, options)


def check_version(version: str, options: BuildOptions) -> None:
    """Raise `PpclError` for a version of TensorRT that is too old, or that does an option wrong."""
    numbers = version_numbers(version)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise PpclError(f"TensorRT {version} is too old; install {oldest} or newer: pip install -U tensorrt")
    first, mended = REFIT_DROPS_BIAS
    if options.refitting == "any" and first <= numbers < mended:
        raise PpclError(
            f"TensorRT {version} can lose biases in an engine that takes other weights; give --refit identical, or "
            f"install {'.'.join(map(str, mended))}"
        )
