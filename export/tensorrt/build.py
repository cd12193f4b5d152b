"""Build an engine from an ONNX file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.store.names import engine_manifest_path
from ppcl_fx.export.tensorrt.manifest import EngineManifest, Hashes
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor, Report, stoppable
from ppcl_fx.export.tensorrt.options import BuildOptions, check_version, configure, network_flags
from ppcl_fx.export.tensorrt.places import Origin, read_graph
from ppcl_fx.export.tensorrt.profiles import Profile, shapes_of
from ppcl_fx.export.tensorrt_api import Api, Gpu, find_gpu
from ppcl_fx.io.files import inside, need_room, new_file, write_json
from ppcl_fx.io.reading import read_bytes

TIMINGS_BYTES = 2**30
"""A cache of kernel timings may be this large."""


def load_tensorrt(left: str, index: int = 0) -> tuple[Api, Gpu]:
    """Return TensorRT and the GPU.

    Args:
        left: what stays without them, for the message: "the ONNX files stay in ENGINES".
        index: which GPU, as CUDA counts them.

    Raises:
        PpclError: TensorRT is not installed, or there is no NVIDIA GPU.
    """
    module = need("tensorrt", extra="tensorrt", left=left)
    gpu = find_gpu(index)
    if gpu is None:
        which = f" {index}" if index else ""
        raise PpclError(
            f"there is no NVIDIA GPU{which} (or no driver) here, and TensorRT builds for the GPU it runs on: pip "
            f'install "ppcl-fx[tensorrt]" on a machine with one and export there; {left}'
        )
    return Api(module), gpu


def build_engine(
    onnx: Path,
    engine: Path,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    *,
    api: Api,
    gpu: Gpu,
    cache: Path | None = None,
    origin: Origin | None = None,
    hashes: Hashes | None = None,
    report: Report | None = None,
) -> EngineManifest:
    """Build an engine and write it, its manifest, and the timing cache.

    Args:
        onnx: the ONNX file; its types are the engine's types.
        engine: where the engine goes, in the same folder; the manifest beside it gets the suffix ``.json``.
        profiles: ranges for its open sizes, one set of them or several.
        options: how to build.
        api: TensorRT.
        gpu: the GPU.
        cache: the timing cache; read if it exists, then replaced, also after a build that was stopped.
        origin: where the graph comes from, for the manifest.
        hashes: known hashes of files, shared by the engines of one weight store.
        report: told how far the build is.

    Raises:
        PpclError: TensorRT is too old, its parser or builder refuses the model, the profiles do not fit, or the disk is
            full.
    """
    started = time.perf_counter()
    options, origin, hashes = options or BuildOptions(), origin or Origin(), hashes or Hashes()
    check_version(str(api.value("__version__")), options)
    graph = read_graph(onnx)
    if not profiles:
        raise PpclError(f"{onnx.name}: an engine needs at least one profile; give --shapes, --batch and --text")
    shapes = [{port.name: shapes_of(port, profile) for port in graph.inputs} for profile in profiles]
    weights = {name: hashes.mark(inside(onnx.parent, name)) for name in graph.weights}
    need_room(engine.parent, 0 if options.stripped else sum(mark.bytes for mark in weights.values()))
    monitor = Monitor(report)
    with new_file(engine) as beside:
        stoppable(
            lambda: _build(api, onnx, beside, shapes, options, cache, monitor),
            monitor.stop,
        )
        engine_manifest_path(engine).unlink(missing_ok=True)  # of the engine that is replaced: never beside this one
    card = EngineManifest(
        file=engine.name,
        engine=hashes.mark(engine),
        onnx=onnx.name,
        graph=hashes.mark(onnx),
        weights=weights,
        dtype=graph.dtype,
        keep=origin.keep,
        students=origin.students,
        plan=origin.plan,
        tensorrt=str(api.value("__version__")),
        cuda=gpu.cuda,
        gpu=gpu.name,
        capability=gpu.capability,
        profiles=list(profiles),
        options=options,
        inputs=graph.inputs,
        outputs=graph.outputs,
        timing_cache=None if cache is None else os.path.relpath(cache, engine.parent),
        graph_parity=origin.parity,
        seconds=time.perf_counter() - started,
    )
    write_json(engine_manifest_path(engine), card)
    return card


def _build(
    api: Api,
    onnx: Path,
    plan: Path,
    shapes: list[dict[str, Any]],
    options: BuildOptions,
    cache: Path | None,
    monitor: Monitor,
) -> None:
    messages = Messages()
    logger = messages.logger(api)
    builder = api.make("Builder", logger=logger)
    network = api.call("Builder.create_network", builder, flags=network_flags(api))
    parser = _parse(api, network, logger, onnx)
    config = api.call("Builder.create_builder_config", builder)
    configure(api, config, options)
    for ranges in shapes:
        _add_profile(api, builder, config, network, ranges, messages)
    callback = monitor.attach(api, config)
    if cache is not None:
        _attach_cache(api, config, cache)
    try:
        done = _serialise(api, builder, network, config, plan)
    finally:
        if cache is not None:
            _keep_cache(api, config, cache)
    if not done:
        what = "the build was stopped" if monitor.stopped else "TensorRT could not build an engine"
        raise PpclError(f"{onnx}: {what}{messages.why()}; the ONNX file stays")
    del callback, parser  # TensorRT may hold no reference to them, and needs them until here


def _parse(api: Api, network: Any, logger: Any, onnx: Path) -> Any:
    parser = api.make("OnnxParser", network=network, logger=logger)
    if not api.call("OnnxParser.parse_from_file", parser, model=str(onnx)):
        errors = [
            str(api.call("ParserError.desc", api.call("OnnxParser.get_error", parser, index=index)))
            for index in range(api.get("OnnxParser.num_errors", parser))
        ]
        raise PpclError(f"{onnx}: TensorRT's parser refuses it ({'; '.join(errors[:3])}); the ONNX file stays")
    return parser


def _add_profile(
    api: Api, builder: Any, config: Any, network: Any, ranges: dict[str, Any], messages: Messages
) -> None:
    shapes = api.call("Builder.create_optimization_profile", builder)
    for index in range(api.get("INetworkDefinition.num_inputs", network)):
        name = str(api.get("ITensor.name", api.call("INetworkDefinition.get_input", network, index=index)))
        size = ranges[name]
        api.call(
            "IOptimizationProfile.set_shape", shapes, input=name, min=size["min"], opt=size["opt"], max=size["max"]
        )
    if api.call("IBuilderConfig.add_optimization_profile", config, profile=shapes) < 0:
        raise PpclError(f"TensorRT refuses the profile{messages.why()}; check the ranges")


def _attach_cache(api: Api, config: Any, cache: Path) -> None:
    """Give the builder what is known of kernel timings; a cache of another GPU or version starts empty."""
    for known in ([read_bytes(cache, TIMINGS_BYTES)] if cache.is_file() else []) + [b""]:
        timings = api.call("IBuilderConfig.create_timing_cache", config, serialized_timing_cache=known)
        attached = timings is not None and api.call(
            "IBuilderConfig.set_timing_cache", config, cache=timings, ignore_mismatch=False
        )
        if attached:
            return
    raise PpclError("TensorRT does not take a timing cache, not even an empty one; check its installation")


def _keep_cache(api: Api, config: Any, cache: Path) -> None:
    timings = api.call("IBuilderConfig.get_timing_cache", config)
    if timings is None:
        return
    with new_file(cache) as beside:
        beside.write_bytes(memoryview(api.call("ITimingCache.serialize", timings)))


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
