"""Let a library compile an ONNX file: how options and profiles reach its builder. `build_engine` does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from ppcl_fx.errors import PpclError
from ppcl_fx.export.kernels import let_take_apart
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor
from ppcl_fx.export.tensorrt.options import PORTABLE, BuildOptions
from ppcl_fx.export.tensorrt_api import Api, Kind, errors_of
from ppcl_fx.io.files import Record, new_file
from ppcl_fx.io.memory import peak_memory
from ppcl_fx.io.reading import read_bytes

TIMINGS_BYTES = 2**30
"""A cache of kernel timings may be this large."""


class Job(Record):
    """What is to be compiled: the ONNX file, where the engine goes, for each profile the smallest, best and largest
    shape of each input, and the timing cache.
    """

    kind: Kind
    onnx: str
    plan: str
    shapes: list[dict[str, dict[str, tuple[int, ...]]]]
    options: BuildOptions
    cache: str | None = None


class Compiled(Record):
    """What is known of a compilation: the layers of the network that was parsed, and the most memory in bytes that its
    process held; None where that cannot be told.
    """

    layers: int
    peak_memory: int | None


def network_flags(api: Api) -> int:
    """Return the flags of a network whose types are those of the ONNX file, as from version 11 on all networks' are."""
    if not api.has("NetworkDefinitionCreationFlag.STRONGLY_TYPED"):
        return 0
    return 1 << int(api.value("NetworkDefinitionCreationFlag.STRONGLY_TYPED"))


def configure(api: Api, config: Any, options: BuildOptions) -> None:
    """Set a builder's options."""
    if api.kind == "rtx":
        targets = options.gpu or PORTABLE
        known = {
            "7.5": api.value("ComputeCapability.SM75"),
            "8.0": api.value("ComputeCapability.SM80"),
            "8.6": api.value("ComputeCapability.SM86"),
            "8.9": api.value("ComputeCapability.SM89"),
            "12.0": api.value("ComputeCapability.SM120"),
            "12.1": api.value("ComputeCapability.SM121"),
        }
        api.set("IBuilderConfig.num_compute_capabilities", config, len(targets))
        for index, target in enumerate(targets):
            capability = known[target]
            api.call("IBuilderConfig.set_compute_capability", config, compute_capability=capability, index=index)
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


def compile_graph(api: Api, job: Job, monitor: Monitor, messages: Messages) -> Compiled:
    """Compile, in this process; the engine is then in the file ``plan`` and the timings in the cache.

    Raises:
        PpclError: the parser or the builder refuses the model or a profile, or the build was stopped.
        OSError: the engine cannot be written.
    """
    onnx, plan, cache = Path(job.onnx), Path(job.plan), None if job.cache is None else Path(job.cache)
    builder = api.make("Builder", logger=messages.logger)
    network = api.call("Builder.create_network", builder, flags=network_flags(api))
    parser = api.make("OnnxParser", network=network, logger=messages.logger)
    if not api.call("OnnxParser.parse_from_file", parser, model=str(onnx)):
        count = api.get("OnnxParser.num_errors", parser)
        errors = (api.call("OnnxParser.get_error", parser, index=index) for index in range(count))
        raise PpclError(f"{onnx}: {api.name}'s parser refuses it ({errors_of(api, errors)}); the ONNX file stays")
    let_take_apart(api, network)
    layers = int(api.get("INetworkDefinition.num_layers", network))
    config = api.call("Builder.create_builder_config", builder)
    configure(api, config, job.options)
    for ranges in job.shapes:
        profile = api.call("Builder.create_optimization_profile", builder)
        for index in range(api.get("INetworkDefinition.num_inputs", network)):
            name = str(api.get("ITensor.name", api.call("INetworkDefinition.get_input", network, index=index)))
            low, best, high = ranges[name]["min"], ranges[name]["opt"], ranges[name]["max"]
            api.call("IOptimizationProfile.set_shape", profile, input=name, min=low, opt=best, max=high)
        if api.call("IBuilderConfig.add_optimization_profile", config, profile=profile) < 0:
            raise PpclError(f"{api.name} refuses the profile{messages.why()}; check the ranges")
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
        what = "the build was stopped" if monitor.stop.is_set() else f"{api.name} could not build an engine"
        raise PpclError(f"{onnx}: {what}{messages.why()}; the ONNX file stays")
    del callback, parser  # the library may hold no reference to them, and needs them until here
    return Compiled(layers=layers, peak_memory=peak_memory() or None)


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
