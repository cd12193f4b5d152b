"""Stand-ins for a GPU: `torch.cuda` as sessions use it, and TensorRT with an engine that doubles its input."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ppcl_fx.export.tensorrt_api import Gpu
from tests.export.fake_trt import FakeApi, Thing, working

PORTS = ["hidden_states", "encoder_hidden_states", "sample"]
ACTIVE = "IExecutionContext.active_optimization_profile"


class Stream:
    """A stream by its number."""

    def __init__(self, number: int, log: list[str]) -> None:
        self.cuda_stream, self.log = number, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def synchronize(self) -> None:
        self.log.append(f"{self.cuda_stream} ends")


class Cuda:
    """What `torch.cuda` is to the session: streams, the current device, graphs."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.devices: list[Any] = []
        self.current = Stream(0, self.log)
        self.recording: Recorded | None = None
        self.fails: str | None = None
        self.made = 0

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        def new(device: Any) -> Stream:
            self.made += 1
            return Stream(self.made, self.log)

        def set_stream(stream: Stream) -> None:
            self.current = stream

        patch.setattr(torch.cuda, "Stream", new)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "set_stream", set_stream)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "device", self.device)
        patch.setattr(torch.cuda, "CUDAGraph", Recorded)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "empty_cache", lambda: self.log.append("empty_cache"))

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Recorded, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.current, self.recording = self.current, stream, graph
        self.log.append("record")
        try:
            yield
        finally:
            self.recording = None
        if self.fails is not None:
            raise RuntimeError(self.fails)  # and, as PyTorch does, leaves the stream of the capture
        self.current = before


class Recorded:
    """A CUDA graph: what was enqueued, to be done again."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for one in self.work:
            one()


def floats(address: int, count: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)


def running(cuda: Cuda, **more: Any) -> FakeApi:
    """TensorRT with an engine that doubles ``hidden_states``."""

    def take(context: Thing, profile_index: int, stream_handle: int) -> bool:
        assert cuda.devices, "not on the session's device"
        context.properties[ACTIVE] = profile_index
        return True

    def shape(context: Thing, name: str, shape: tuple[int, ...]) -> bool:
        context.properties[name] = shape
        return True

    def place(context: Thing, name: str, memory: int) -> bool:
        context.properties[f"{name} at"] = memory
        return True

    def execute(context: Thing, stream_handle: int) -> bool:
        assert stream_handle == cuda.current.cuda_stream
        count = torch.Size(context.properties["hidden_states"]).numel()
        source, target = context.properties["hidden_states at"], context.properties["sample at"]
        if cuda.recording is None:
            cuda.log.append(f"run on {stream_handle}")

        def work() -> None:
            floats(target, count).copy_(2 * floats(source, count))

        (work() if cuda.recording is None else cuda.recording.work.append(work))
        return True

    answers = {
        "ICudaEngine__num_io_tensors": len(PORTS),
        "ICudaEngine__get_tensor_name": lambda engine, index: PORTS[index],
        "ICudaEngine__get_tensor_mode": lambda e, name: f"TensorIOMode.{'OUT' if name == 'sample' else 'IN'}PUT",
        "ICudaEngine__get_tensor_dtype": "DataType.FLOAT",
        "ICudaEngine__create_execution_context": lambda engine: Thing("IExecutionContext", {ACTIVE: 0}),
        "IExecutionContext__set_optimization_profile_async": take,
        "IExecutionContext__set_input_shape": shape,
        "IExecutionContext__set_tensor_address": place,
        "IExecutionContext__get_tensor_shape": lambda context, name: context.properties["hidden_states"],
        "IExecutionContext__execute_async_v3": execute,
    }
    return working(**(answers | more))


def running_rtx(cuda: Cuda, **more: Any) -> FakeApi:
    """TensorRT for RTX, whose cache holds what it was given, and one kernel more."""
    known: list[bytes] = [b""]

    def take(cache: Thing, blob: bytes) -> bool:
        known[0] = bytes(blob)
        return True

    answers = {
        "Runtime__get_engine_validity": ("EngineValidity.VALID", 0),
        "IRuntimeConfig__create_runtime_cache": lambda config: Thing("IRuntimeCache"),
        "IRuntimeCache__deserialize": take,
        "IRuntimeConfig__set_runtime_cache": True,
        "IRuntimeCache__serialize": lambda cache: known[0] + b"k",
        "ICudaEngine__create_execution_context": lambda engine, runtime_config: Thing("IExecutionContext", {ACTIVE: 0}),
    }
    return running(cuda, kind="rtx", gpu=Gpu("RTX 4090", "8.9", "13.0"), **(answers | more))
