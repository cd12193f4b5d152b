"""The TensorRT builder's own work: profiles, options, manifests, stops and refusals.

TensorRT itself cannot be had here. `fake_trt` answers in its place, and each call is checked against the signatures of
NVIDIA's compiled bindings; what the calls do on a GPU is not shown.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.tensorrt.build import build_engine, check_version
from ppcl_fx.export.tensorrt.loading import load_engine
from ppcl_fx.export.tensorrt.manifest import EngineManifest, read_engine_manifest
from ppcl_fx.export.tensorrt.monitor import Monitor
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Profile, Range, Spec
from ppcl_fx.export.tensorrt.request import read_graph
from ppcl_fx.export.tensorrt_api import Gpu, find_gpu, load_tensorrt
from tests.export.fake_trt import FakeApi, Thing, working

SPEC = Spec(tokens="64-4096", batch="1-4", text="1-512")
PROFILE = Profile(
    name="64-4096 tokens",
    sizes={
        "batch": Range(min=1, opt=4, max=4),
        "hidden_states_1": Range(min=64, opt=4096, max=4096),
        "encoder_hidden_states_1": Range(min=1, opt=512, max=512),
    },
)


def write_graph(path: Path, value: float = 0.5) -> Path:
    """A graph with open sizes and a weight in a file in a subfolder, as an export writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "weights").mkdir(exist_ok=True)

    def tensor(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], struct.pack("<16f", *[value] * 16), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["hidden_states", "w"], ["sample"])],
        "graph",
        [
            tensor("hidden_states", "batch", "hidden_states_1", 4),
            tensor("encoder_hidden_states", "batch", "encoder_hidden_states_1", 4),
        ],
        [tensor("sample", "batch", "hidden_states_1", 4)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    location = f"weights/{path.stem}.bin"
    (path.parent / location).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "keep-0.7.onnx")


def build(graph: Path, api: FakeApi, *, options: BuildOptions | None = None, **more: Any) -> EngineManifest:
    engine, cache = graph.with_suffix(".engine"), graph.parent / "t.cache"
    return build_engine(graph, engine, [PROFILE], options, api=api, cache=cache, **more)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_missing_tensorrt_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(PpclError) as caught:
        need("tensorrt_that_is_not_there", extra="tensorrt", left="the ONNX files stay in ENGINES")
    assert str(caught.value) == (
        'tensorrt_that_is_not_there is not installed: pip install "ppcl-fx[tensorrt]"; the ONNX files stay in ENGINES'
    )


# With TensorRT and a GPU there is nothing to refuse.
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None and find_gpu() is not None,
    reason="there are TensorRT and a GPU here",
)
def test_load_tensorrt_says_what_stays() -> None:
    with pytest.raises(
        PpclError, match=r'pip install "ppcl-fx\[tensorrt\]".*the ONNX files stay in ENGINES'
    ) as caught:
        load_tensorrt("the ONNX files stay in ENGINES")
    assert "\n" not in str(caught.value)


def test_a_build_sets_every_option_and_writes_its_manifest(graph: Path) -> None:
    api = working(plan=b"an engine")
    options = BuildOptions(workspace=2**30, level=4, stripped=True, weight_streaming=5)
    seen: list[tuple[int, int, str]] = []
    card = build(graph, api, options=options, report=lambda *step: seen.append(step))
    engine = graph.with_suffix(".engine")
    assert engine.read_bytes() == b"an engine"
    assert (graph.parent / "t.cache").read_bytes() == b"timings"
    assert files(graph.parent) == [
        "keep-0.7.engine", "keep-0.7.engine.json", "keep-0.7.onnx", "t.cache", "weights"
    ]  # fmt: skip
    calls = dict(api.calls)
    assert calls["Builder.create_network"] == {"flags": 1}
    assert calls["IBuilderConfig.set_memory_pool_limit"] == {"pool": "MemoryPoolType.WORKSPACE", "pool_size": 2**30}
    flags = [words["flag"] for path, words in api.calls if path == "IBuilderConfig.set_flag"]
    assert flags == [f"BuilderFlag.{name}" for name in ("REFIT_IDENTICAL", "STRIP_PLAN", "WEIGHT_STREAMING")]
    shapes = [words for path, words in api.calls if path == "IOptimizationProfile.set_shape"]
    assert shapes == [
        {"input": "hidden_states", "min": (1, 64, 4), "opt": (4, 4096, 4), "max": (4, 4096, 4)},
        {"input": "encoder_hidden_states", "min": (1, 1, 4), "opt": (4, 512, 4), "max": (4, 512, 4)},
    ]
    assert [done for done, _, _ in seen] == [0, 50, 100]
    assert read_engine_manifest(engine) == card
    assert (card.gpu, card.capability, card.cuda, card.tensorrt) == ("NVIDIA Test", "9.0", "13.0", "11.4.0.106")
    assert set(card.weights) == {"weights/keep-0.7.bin"} and card.weights["weights/keep-0.7.bin"].bytes == 64
    assert card.parity is None and "not compared with PyTorch" in card.not_checked[0]
    assert card.profiles == [PROFILE] and card.options == options and card.timing_cache == "t.cache"
    assert [port.name for port in card.inputs] == ["hidden_states", "encoder_hidden_states"]


def test_several_profiles_are_added_in_order(graph: Path) -> None:
    api = working()
    other = PROFILE.model_copy(update={"name": "b"})
    card = build_engine(graph, graph.with_suffix(".engine"), [PROFILE, other], api=api)
    assert api.names().count("IBuilderConfig.add_optimization_profile") == 2
    assert [profile.name for profile in card.profiles] == ["64-4096 tokens", "b"]
    assert card.timing_cache is None and "IBuilderConfig.create_timing_cache" not in api.names()


def test_a_timing_cache_is_used_again_and_one_that_does_not_fit_is_replaced(graph: Path) -> None:
    (graph.parent / "t.cache").write_bytes(b"old")
    offered: list[bytes] = []

    def create(owner: Thing, serialized_timing_cache: bytes) -> Thing:
        offered.append(serialized_timing_cache)
        return Thing("ITimingCache", {"data": serialized_timing_cache})

    def fits(owner: Thing, cache: Thing, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        return cache.properties["data"] == b""

    build(graph, working(IBuilderConfig__create_timing_cache=create))
    assert offered == [b"old"]
    build(graph, working(IBuilderConfig__create_timing_cache=create, IBuilderConfig__set_timing_cache=fits))
    assert offered == [b"old", b"timings", b""]


def test_a_version_that_cannot_stream_writes_the_engine_whole(graph: Path) -> None:
    absent = "Builder.build_serialized_network_to_stream"
    card = build(graph, working(plan=b"whole", version="10.15.0.36", absent=absent))
    assert graph.with_suffix(".engine").read_bytes() == b"whole"
    assert card.engine.bytes == 5


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"OnnxParser__parse_from_file": False, "OnnxParser__num_errors": 1, "ParserError__desc": "no Foo"}, "no Foo"),
        ({"IBuilderConfig__add_optimization_profile": -1}, "refuses the profile"),
        ({"Builder__build_serialized_network_to_stream": False}, "could not build"),
        ({"IBuilderConfig__set_timing_cache": False}, "not even an empty one"),
    ],
)
def test_what_tensorrt_refuses_is_one_line_and_leaves_nothing(graph: Path, answers: Any, words: str) -> None:
    with pytest.raises(PpclError, match=words) as caught:
        build(graph, working(**answers))
    assert "\n" not in str(caught.value)
    assert not [name for name in files(graph.parent) if "engine" in name]


def test_what_tensorrt_said_last_is_in_the_error(graph: Path) -> None:
    api = working()

    def fail(owner: Thing, network: Thing, config: Thing, writer: Thing) -> bool:
        logger = next(words["logger"] for path, words in api.calls if path == "Builder")
        logger.methods["log"](1, "out of\nmemory")
        return False

    api.answers["Builder.build_serialized_network_to_stream"] = fail
    with pytest.raises(PpclError, match=r"could not build an engine \(out of memory\)"):
        build(graph, api)


def test_a_full_disk_is_a_line_and_leaves_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppcl_fx.export.tensorrt import compiling as module

    class Full(module._Sink):
        def write(self, data: bytes) -> int:
            self.error = OSError(28, "No space left on device")
            return 0

    monkeypatch.setattr(module, "_Sink", Full)
    with pytest.raises(PpclError, match="No space left on device"):
        build(graph, working())
    assert files(graph.parent) == ["keep-0.7.onnx", "t.cache", "weights"]


# Windows has no SIGINT that a process can send itself.
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_build_at_its_next_step_and_keeps_the_timings(
    graph: Path, request: pytest.FixtureRequest
) -> None:
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    began, ended = threading.Event(), threading.Event()

    def slow(owner: Thing, network: Thing, config: Thing, writer: Thing) -> bool:
        monitor = config.properties["IBuilderConfig.progress_monitor"].methods
        monitor["phase_start"]("Building", None, 10**6)
        began.set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if not monitor["step_complete"]("Building", 0):
                ended.set()
                return False
            time.sleep(0.005)
        return True

    def interrupt() -> None:
        began.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        build(graph, working(Builder__build_serialized_network_to_stream=slow))
    assert ended.is_set()
    assert files(graph.parent) == ["keep-0.7.onnx", "t.cache", "weights"]


def test_nested_phases_are_one_share_that_never_falls() -> None:
    seen: list[int] = []
    monitor = Monitor(lambda done, total, phase: seen.append(done))
    monitor.phase_start("outer", None, 4)
    assert monitor.step_complete("outer", 0)
    monitor.phase_start("inner", "outer", 5)
    monitor.step_complete("inner", 1)  # 1/4 + 1/4 * 2/5
    monitor.phase_finish("inner")
    monitor.step_complete("outer", 1)
    monitor.phase_finish("outer")
    assert seen == [0, 25, 25, 35, 50, 100]
    assert monitor.step_complete("unknown", 3)
    monitor.stop.set()
    assert not monitor.step_complete("unknown", 4)


@pytest.mark.parametrize(
    ("version", "refit", "words"),
    [
        ("10.14.1.48", "none", "too old; install 10.15"),
        ("10.15.1.29", "none", ""),
        ("11.3.0.99", "any", "can lose biases.*--refit identical, or install 11.4"),
        ("11.3.0.99", "identical", ""),
        ("11.2.1.2", "any", ""),
        ("11.4.0.106", "any", ""),
        ("10.16.3.9.post1", "any", ""),
    ],
)
def test_versions_are_gated(version: str, refit: Any, words: str) -> None:
    options = BuildOptions(refit=refit)
    if words:
        with pytest.raises(PpclError, match=words):
            check_version(version, options)
    else:
        check_version(version, options)


def test_stripped_prefers_identical_weights() -> None:
    assert BuildOptions(stripped=True).refitting == "identical"
    assert BuildOptions(stripped=True, refit="any").refitting == "any"
    assert BuildOptions().refitting == "none"
    with pytest.raises(PpclError, match="option precision: there is no such option"):
        BuildOptions.model_validate({"precision": "fp16"})


def test_a_stripped_engine_is_loaded_with_the_weights_of_the_store(graph: Path) -> None:
    build(graph, working(), options=BuildOptions(stripped=True, weight_streaming=7))
    api = working(ICudaEngine__streamable_weights_size=64)
    loaded = load_engine(graph.with_suffix(".engine"), api=api)
    calls = dict(api.calls)
    assert calls["OnnxParserRefitter.refit_from_file"] == {"model": str(graph)}
    order = api.names()
    assert order.index("Refitter.refit_cuda_engine") < order.index("ICudaEngine.weight_streaming_budget_v2")
    assert loaded.engine.properties["ICudaEngine.weight_streaming_budget_v2"] == 7
    # More than there is means all of it.
    small = working(ICudaEngine__streamable_weights_size=5)
    loaded = load_engine(graph.with_suffix(".engine"), api=small)
    assert loaded.engine.properties["ICudaEngine.weight_streaming_budget_v2"] == 5
    plain = working()
    build(graph, working())
    load_engine(graph.with_suffix(".engine"), api=plain)
    assert "Refitter" not in plain.names()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"ICudaEngine__refittable": False}, "not built to take weights"),
        ({"OnnxParserRefitter__refit_from_file": False, "OnnxParserRefitter__num_errors": 1,
          "ParserError__desc": "shape of w"}, "shape of w"),
        ({"Refitter__get_missing_weights": ["w", "v"]}, "2 weights of the engine are not in it .'w'."),
        ({"Refitter__refit_cuda_engine": False}, "cannot refit"),
        ({"Runtime__deserialize_cuda_engine": None}, "cannot read it.*ppcl-fx build"),
    ],
)  # fmt: skip
def test_an_engine_without_all_of_its_weights_is_refused(graph: Path, answers: Any, words: str) -> None:
    build(graph, working(), options=BuildOptions(stripped=True))
    with pytest.raises(PpclError, match=words):
        load_engine(graph.with_suffix(".engine"), api=working(**answers))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda g: g.with_suffix(".engine").write_bytes(b"pl"), "has 2 bytes and 4 are expected"),
        (lambda g: write_graph(g, 0.25) and g.write_bytes(g.read_bytes() + b"\n"), "keep-0.7.onnx is not the file"),
        (lambda g: (g.parent / "weights/keep-0.7.bin").write_bytes(b"x" * 64), "keep-0.7.bin is not the file"),
        (lambda g: (g.parent / "weights/keep-0.7.bin").write_bytes(b"x"), "keep-0.7.bin is not the file"),
        (lambda g: (g.parent / "weights/keep-0.7.bin").unlink(), "is missing"),
        (lambda g: g.with_suffix(".engine.json").unlink(), "nothing says what the engine is for"),
        (lambda g: g.with_suffix(".engine").unlink(), "no such engine"),
    ],
)
def test_what_changed_since_the_build_is_refused_with_the_command(graph: Path, spoil: Any, words: str) -> None:
    build(graph, working(), options=BuildOptions(stripped=True))
    spoil(graph)
    with pytest.raises(PpclError, match=words) as caught:
        load_engine(graph.with_suffix(".engine"), api=working())
    assert f"ppcl-fx build {graph.parent} --overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_gpu_or_version_is_refused(graph: Path) -> None:
    build(graph, working())
    engine = graph.with_suffix(".engine")
    with pytest.raises(PpclError, match=r"for NVIDIA Test \(9.0\), and this is Other \(8.0\); build it here: ppcl"):
        load_engine(engine, api=working(gpu=Gpu("Other", "8.0", "13.0")))
    with pytest.raises(PpclError, match=r"built with TensorRT 11.4.0.106, and this is 11.5.0.1; build it here: ppcl"):
        load_engine(engine, api=working(version="11.5.0.1"))


def test_a_manifest_takes_no_unknown_field(graph: Path) -> None:
    build(graph, working())
    card = graph.with_suffix(".engine.json")
    plain = json.loads(card.read_text(encoding="utf-8")) | {"studnets": []}
    card.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(PpclError, match=r"studnets.*did you mean 'students'"):
        read_engine_manifest(graph.with_suffix(".engine"))


def test_weights_outside_of_the_folder_are_refused(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../weights.bin"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(PpclError, match="leaves its folder"):
        read_graph(graph)
    graph.write_bytes(b"\x08no")
    with pytest.raises(PpclError, match="keep-0.7.onnx: damaged"):
        read_graph(graph)
