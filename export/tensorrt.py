"""Build a TensorRT engine from an ONNX file: strongly typed, one profile, a timing cache, a JSON sidecar."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import need
from ppcl_fx.export.sidecar import Port
from ppcl_fx.export.tensorrt_api import Api, gpu_name
from ppcl_fx.files import write_json


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """The sizes an engine takes for one open size: smallest, the one it is tuned for, largest."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a range goes min <= opt <= max, and {self.min}, {self.opt}, {self.max} does not")
        return self


class Profile(_Strict):
    """The engine's optimisation profile.

    Attributes:
        sizes: for each open size of the ONNX file, by its name, the range.
        workspace: bytes of GPU memory that a kernel may use for itself; ``None`` for all there is.
        level: TensorRT's builder optimisation level, 0 (quick to build) to 5; ``None`` for its default.
    """

    sizes: dict[str, Range] = Field(default_factory=dict)
    workspace: int | None = Field(default=None, ge=0)
    level: int | None = Field(default=None, ge=0, le=5)


class EngineCard(_Strict):
    """The JSON beside an engine.

    Attributes:
        file: name of the engine file in the same folder.
        onnx: name of the ONNX file it was built from.
        dtype: type of weights and activations.
        tensorrt: version of TensorRT; an engine runs with that version only.
        gpu: the GPU it was built on, and for.
        profile: the shapes it takes.
        inputs: its inputs; a name in a shape is a size of the profile.
        timing_cache: name of the timing cache.
        seconds: what the build took.
        made_by: version of this package.
    """

    version: Literal[1] = 1
    kind: Literal["tensorrt"] = "tensorrt"
    file: str
    onnx: str
    dtype: str
    tensorrt: str
    gpu: str
    profile: Profile
    inputs: list[Port]
    timing_cache: str
    seconds: float
    made_by: str = __version__


def load_tensorrt(left: str) -> tuple[Api, str]:
    """Return TensorRT and the GPU's name.

    Args:
        left: what stays without them, for the message: "the ONNX files stay in ENGINES".

    Raises:
        PpclError: TensorRT is not installed, or there is no NVIDIA GPU.
    """
    module = need("tensorrt", extra="tensorrt", left=left)
    gpu = gpu_name()
    if gpu is None:
        raise PpclError(
            'there is no NVIDIA GPU (or no driver) here, and TensorRT builds for the GPU it runs on: pip install '
            f'"ppcl-fx[tensorrt]" on a machine with one and export there; {left}'
        )
    return Api(module), gpu


def default_profile(inputs: list[Port], sizes: dict[str, int]) -> Profile:
    """Return a profile around an example.

    Args:
        inputs: the inputs of the ONNX file.
        sizes: the example's size for each open size by name.
    """
    names = {str(size) for port in inputs for size in port.shape if isinstance(size, str)}
    open_sizes = {name: size for name, size in sizes.items() if name in names}
    return Profile(sizes={n: Range(min=1, opt=s, max=(2 if n == "batch" else 4) * s) for n, s in open_sizes.items()})


def build_engine(
    onnx: Path, engine: Path, inputs: list[Port], profile: Profile, *, api: Api, gpu: str, dtype: str, cache: Path
) -> EngineCard:
    """Build an engine and write it, its JSON sidecar, and the timing cache.

    Args:
        onnx: the ONNX file; its types are the engine's types.
        engine: where the engine goes; the sidecar beside it gets the suffix ``.json``.
        inputs: the inputs of the ONNX file.
        profile: ranges for its open sizes.
        api: TensorRT.
        gpu: the GPU's name, for the sidecar.
        dtype: type of the weights, for the sidecar.
        cache: the timing cache; read if it exists, then replaced.

    Raises:
        PpclError: TensorRT's parser or builder refuses the model, or the profile does not fit.
    """
    started = time.perf_counter()
    ranges = {port.name: _shapes(port, profile) for port in inputs}
    logger = api.make("Logger", min_severity=api.value("ILogger.Severity.WARNING"))
    builder = api.make("Builder", logger=logger)
    typed = 1 << int(api.value("NetworkDefinitionCreationFlag.STRONGLY_TYPED"))
    network = api.call("Builder.create_network", builder, flags=typed)
    _parse(api, network, logger, onnx)
    config = api.call("Builder.create_builder_config", builder)
    _configure(api, config, profile)
    _add_profile(api, builder, config, network, ranges)
    _attach_cache(api, config, cache)
    plan = api.call("Builder.build_serialized_network", builder, network=network, config=config)
    if plan is None:
        raise PpclError(f"{onnx}: TensorRT could not build an engine; its messages above say why; the ONNX file stays")
    timings = api.call("IBuilderConfig.get_timing_cache", config)
    if timings is not None:
        _write_bytes(cache, api.call("ITimingCache.serialize", timings))
    _write_bytes(engine, plan)
    card = EngineCard(
        file=engine.name,
        onnx=onnx.name,
        dtype=dtype,
        tensorrt=str(api.value("__version__")),
        gpu=gpu,
        profile=profile,
        inputs=inputs,
        timing_cache=cache.name,
        seconds=time.perf_counter() - started,
    )
    write_json(engine.with_name(f"{engine.name}.json"), card)
    return card


def _shapes(port: Port, profile: Profile) -> tuple[tuple[int, ...], ...]:
    """Return an input's smallest, best and largest shape."""
    for size in port.shape:
        if isinstance(size, str) and size not in profile.sizes:
            raise PpclError(
                f"the profile has no range for the size {size!r} of the input {port.name!r}"
                f"{near(size, profile.sizes)}; add one"
            )
    kinds = ("min", "opt", "max")
    return tuple(
        tuple(size if isinstance(size, int) else getattr(profile.sizes[size], kind) for size in port.shape)
        for kind in kinds
    )


def _parse(api: Api, network: Any, logger: Any, onnx: Path) -> None:
    parser = api.make("OnnxParser", network=network, logger=logger)
    if api.call("OnnxParser.parse_from_file", parser, model=str(onnx)):
        return
    errors = [
        str(api.call("ParserError.desc", api.call("OnnxParser.get_error", parser, index=index)))
        for index in range(api.get("OnnxParser.num_errors", parser))
    ]
    raise PpclError(f"{onnx}: TensorRT's parser refuses it ({'; '.join(errors[:3])}); the ONNX file stays")


def _configure(api: Api, config: Any, profile: Profile) -> None:
    if profile.workspace is not None:
        pool = api.value("MemoryPoolType.WORKSPACE")
        api.call("IBuilderConfig.set_memory_pool_limit", config, pool=pool, pool_size=profile.workspace)
    if profile.level is not None:
        api.set("IBuilderConfig.builder_optimization_level", config, profile.level)


def _add_profile(api: Api, builder: Any, config: Any, network: Any, ranges: dict[str, Any]) -> None:
    shapes = api.call("Builder.create_optimization_profile", builder)
    for index in range(api.get("INetworkDefinition.num_inputs", network)):
        name = str(api.get("ITensor.name", api.call("INetworkDefinition.get_input", network, index=index)))
        low, best, high = ranges[name]
        api.call("IOptimizationProfile.set_shape", shapes, input=name, min=low, opt=best, max=high)
    if api.call("IBuilderConfig.add_optimization_profile", config, profile=shapes) < 0:
        raise PpclError("TensorRT refuses the profile; its messages above say why; check the ranges")


def _attach_cache(api: Api, config: Any, cache: Path) -> None:
    """Give the builder what is known of kernel timings; a cache of another GPU or version starts empty."""
    for known in [cache.read_bytes()] * cache.is_file() + [b""]:
        timings = api.call("IBuilderConfig.create_timing_cache", config, serialized_timing_cache=known)
        attached = timings is not None and api.call(
            "IBuilderConfig.set_timing_cache", config, cache=timings, ignore_mismatch=False
        )
        if attached:
            return
    raise PpclError("TensorRT does not take a timing cache, not even an empty one; check its installation")


def _write_bytes(path: Path, data: Any) -> None:
    beside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(memoryview(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
