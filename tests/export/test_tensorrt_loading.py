"""Loading an engine: on which GPU, with how much of the weights there, and without code for the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.export import tensorrt_api
from ppcl_fx.export.tensorrt.loading import load_engine
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt_api import Gpu
from tests.export.fake_trt import working
from tests.export.test_tensorrt import build, write_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "keep-0.7.onnx")


def test_a_budget_that_tensorrt_does_not_take_is_refused(graph: Path) -> None:
    build(graph, working(), options=BuildOptions(weight_streaming=7))
    # Setting the property raises nothing; another value stands there afterwards.
    api = working(ICudaEngine__streamable_weights_size=64, ICudaEngine__weight_streaming_budget_v2=64)
    with pytest.raises(PpclError, match="does not keep 7 bytes of its weights on the GPU.*--weight-streaming"):
        load_engine(graph.with_suffix(".engine"), api=api)


def test_an_engine_may_bring_no_code_for_the_host(graph: Path) -> None:
    build(graph, working())
    api = working()
    load_engine(graph.with_suffix(".engine"), api=api)
    order = api.names()
    assert dict(api.calls)["Runtime.engine_host_code_allowed"] == {"value": False}
    assert order.index("Runtime.engine_host_code_allowed") < order.index("Runtime.deserialize_cuda_engine")


class _Driver:
    """NVIDIA's driver as `find_gpu` asks it, with two GPUs."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 10 + index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, found: Any, what: int, device: Any) -> int:
        found._obj.value = device.value
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return 0


def test_a_gpu_is_found_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api.ctypes, "CDLL", lambda name: _Driver())
    assert tensorrt_api.find_gpu() == Gpu("GPU 10", "10.10", "13.0")
    assert tensorrt_api.find_gpu(1) == Gpu("GPU 11", "11.11", "13.0")
    assert tensorrt_api.find_gpu(2) is None
