"""Build an engine from an ONNX file: what its options need of a TensorRT version, and how they reach the builder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ppcl_fx.errors import PpclError
from ppcl_fx.export.kernels import let_take_apart
from ppcl_fx.export.store.manifest import mark_of
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor, Report, silent, stoppable
from ppcl_fx.export.tensorrt.profiles import Profile, shapes_of
from ppcl_fx.export.tensorrt.request import BuildOptions, Origin, read_graph
from ppcl_fx.export.tensorrt_api import Api, errors_of, version_numbers
from ppcl_fx.io.files import inside, need_room, new_file, write_json
from ppcl_fx.io.reading import read_bytes

TIMINGS_BYTES = 2**30
"""A cache of kernel timings may be this large."""

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
    """Build an engine and write it, its manifest, and the timing cache.

    Args:
        onnx: the ONNX file; its types are the engine's types.
        engine: where the engine goes, in the same folder; the manifest beside it gets the suffix ``.json``.
        profiles: ranges for its open sizes, one set of them or several.
        cache: the timing cache; read if it exists, then replaced, also after a build that was stopped.
        origin: where the graph comes from, for the manifest.
        report: told how far the build is.

    Raises:
        PpclError: TensorRT is too old, its parser or builder refuses the model, the profiles do not fit, or the disk is
            full.
    """
    started = time.perf_counter()
    options, origin = options or BuildOptions(), origin or Origin()
    check_version(api.version, options)
    graph = read_graph(onnx)
    if not profiles:
        raise PpclError(f"{onnx.name}: an engine needs at least one profile; give --shapes, --batch and --text")
    shapes = [{port.name: shapes_of(port, profile) for port in graph.inputs} for profile in profiles]
    weights = {name: mark_of(inside(onnx.parent, name)) for name in graph.weights}
    need_room(engine.parent, 0 if options.stripped else sum(mark.bytes for mark in weights.values()))
    monitor = Monitor(report)
    with new_file(engine) as beside:
        stoppable(lambda: _build(api, onnx, beside, shapes, options, cache, monitor), monitor.stop.set)
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
        tensorrt=api.version,
        cuda=api.gpu.cuda,
        gpu=api.gpu.name,
        capability=api.gpu.capability,
        profiles=list(profiles),
        options=options,
        inputs=graph.inputs,
        outputs=graph.outputs,
        timing_cache=None if cache is None else os.path.relpath(cache, engine.parent),
        graph_parity=origin.parity,
        seconds=time.perf_counter() - started,
    )
    write_json(engine_manifest_path(engine), manifest)
    return manifest


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


def network_flags(api: Api) -> int:
    """Return the flags of a network whose types are those of the ONNX file, as from version 11 on all networks' are."""
    if not api.has("NetworkDefinitionCreationFlag.STRONGLY_TYPED"):
        return 0
    return 1 << int(api.value("NetworkDefinitionCreationFlag.STRONGLY_TYPED"))


def configure(api: Api, config: Any, options: BuildOptions) -> None:
    """Set a builder's options."""
    if options.workspace is not None:
        pool = api.value("MemoryPoolType.WORKSPACE")
        api.call("IBuilderConfig.set_memory_pool_limit", config, pool=pool, pool_size=options.workspace)
    if options.level is not None:
        api.set("IBuilderConfig.builder_optimization_level", config, options.level)
    if options.refitting == "identical":
        api.call("IBuilderConfig.set_flag", config, flag=api.value("BuilderFlag.REFIT_IDENTICAL"))
    if options.refitting == "any":
        api.call("IBuilderConfig.set_flag", config, flag=api.value("BuilderFlag.REFIT"))
    if options.stripped:
        api.call("IBuilderConfig.set_flag", config, flag=api.value("BuilderFlag.STRIP_PLAN"))
    if options.weight_streaming is not None:
        api.call("IBuilderConfig.set_flag", config, flag=api.value("BuilderFlag.WEIGHT_STREAMING"))


def _build(
    api: Api,
    onnx: Path,
    plan: Path,
    shapes: list[dict[str, Any]],
    options: BuildOptions,
    cache: Path | None,
    monitor: Monitor,
) -> None:
    messages = Messages(api)
    builder = api.make("Builder", logger=messages.logger)
    network = api.call("Builder.create_network", builder, flags=network_flags(api))
    parser = api.make("OnnxParser", network=network, logger=messages.logger)
    if not api.call("OnnxParser.parse_from_file", parser, model=str(onnx)):
        count = api.get("OnnxParser.num_errors", parser)
        errors = (api.call("OnnxParser.get_error", parser, index=index) for index in range(count))
        raise PpclError(f"{onnx}: TensorRT's parser refuses it ({errors_of(api, errors)}); the ONNX file stays")
    let_take_apart(api, network)
    config = api.call("Builder.create_builder_config", builder)
    configure(api, config, options)
    for ranges in shapes:
        profile = api.call("Builder.create_optimization_profile", builder)
        for index in range(api.get("INetworkDefinition.num_inputs", network)):
            name = str(api.get("ITensor.name", api.call("INetworkDefinition.get_input", network, index=index)))
            low, best, high = ranges[name]["min"], ranges[name]["opt"], ranges[name]["max"]
            api.call("IOptimizationProfile.set_shape", profile, input=name, min=low, opt=best, max=high)
        if api.call("IBuilderConfig.add_optimization_profile", config, profile=profile) < 0:
            raise PpclError(f"TensorRT refuses the profile{messages.why()}; check the ranges")
    callback = monitor.attach(api, config)
    if cache is not None:
        _attach_cache(api, config, cache)
    try:
        done = _serialise(api, builder, network, config, plan)
    finally:
        timings = None if cache is None else api.call("IBuilderConfig.get_timing_cache", config)
        if cache is not None and timings is not None:
            with new_file(cache) as beside:
                beside.write_bytes(memoryview(api.call("ITimingCache.serialize", timings)))
    if not done:
        what = "the build was stopped" if monitor.stop.is_set() else "TensorRT could not build an engine"
        raise PpclError(f"{onnx}: {what}{messages.why()}; the ONNX file stays")
    del callback, parser  # TensorRT may hold no reference to them, and needs them until here


def _attach_cache(api: Api, config: Any, cache: Path) -> None:
    """Give the builder what is known of kernel timings; a cache of another GPU or version starts empty."""
    for known in ([read_bytes(cache, TIMINGS_BYTES)] if cache.is_file() else []) + [b""]:
        timings = api.call("IBuilderConfig.create_timing_cache", config, serialized_timing_cache=known)
        if timings is not None and api.call(
            "IBuilderConfig.set_timing_cache", config, cache=timings, ignore_mismatch=False
        ):
            return
    raise PpclError("TensorRT does not take a timing cache, not even an empty one; check its installation")


class _Sink:
    """Takes an engine piece by piece; TensorRT swallows exceptions, so an error waits here."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            return 0


def _serialise(api: Api, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build and write; where TensorRT can, without the whole engine in memory a second time."""
    if not api.has("Builder.build_serialized_network_to_stream"):
        plan = api.call("Builder.build_serialized_network", builder, network=network, config=config)
        if plan is not None:
            path.write_bytes(memoryview(plan))
        return plan is not None
    with path.open("wb") as file:
        sink = _Sink(file)
        writer = api.implement("IStreamWriter", write=sink.write)
        done = api.call(
            "Builder.build_serialized_network_to_stream", builder, network=network, config=config, writer=writer
        )
    if sink.error is not None:
        raise sink.error
    return bool(done)
