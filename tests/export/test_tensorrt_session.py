"""The TensorRT session's own work: the order of calls, profiles, CUDA graphs, and the way back where none can be made.

TensorRT and CUDA are played: an engine that doubles its input, on the CPU's memory, and a CUDA graph that repeats what
was enqueued while it was recorded. What the calls do on a GPU is not shown.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.folder import Artefact
from ppcl_fx.export.runtime.options import RuntimeOptions
from ppcl_fx.export.runtime.sessions import TENSORRT, SessionChoice, Sessions
from ppcl_fx.export.runtime.tensorrt_session import GRAPHS, TensorRTSession
from ppcl_fx.export.store import manifest as manifests
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.tensorrt import loading
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.options import BuildOptions
from tests.export.fake_cuda import ACTIVE, Cuda, running, running_rtx
from tests.export.fake_trt import FakeApi, Thing, working
from tests.export.test_tensorrt import PROFILE, write_graph


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    played = Cuda()
    played.patch(monkeypatch)
    return played


@pytest.fixture
def choice(tmp_path: Path) -> SessionChoice:
    """A stripped engine of two profiles; the CPU's memory stands for the GPU's."""
    graph = write_graph(tmp_path / "keep-0.7.onnx")
    engine = graph.with_suffix(".engine")
    options = BuildOptions(stripped=True)
    card = build_engine(graph, engine, [PROFILE, PROFILE], options, api=working())
    manifest = Manifest.model_construct(outputs=card.outputs, keep=0.7)
    return SessionChoice(TENSORRT, Artefact(graph, manifest, card), torch.device("cpu"))


def opened(choice: SessionChoice, api: FakeApi, patch: pytest.MonkeyPatch) -> TensorRTSession:
    patch.setattr(loading, "load_tensorrt", lambda left, index, kind: api)
    return TensorRTSession(choice)


@pytest.fixture
def rtx(choice: SessionChoice) -> SessionChoice:
    """The same engine, as TensorRT for RTX builds it."""
    card = choice.artefact.engine_manifest
    assert card is not None
    options = BuildOptions(gpu=("8.9",))
    graph = choice.artefact.graph
    built = build_engine(graph, graph.with_suffix(".engine"), [PROFILE], options, api=working(kind="rtx", gpu=None))
    return replace(choice, artefact=replace(choice.artefact, engine_manifest=built))


def call(session: TensorRTSession, tokens: int, profile: int = 0, value: float = 1.0) -> None:
    """Run the session and see that the answer is its input, doubled."""
    feeds = {"hidden_states": torch.full((1, tokens, 4), value), "encoder_hidden_states": torch.zeros(1, 1, 4)}
    assert torch.equal(session.run(feeds, {}, profile), 2 * feeds["hidden_states"])


def counted(api: FakeApi, name: str) -> int:
    return api.names().count(name)


def test_a_call_sets_profile_shapes_and_addresses_before_it_runs(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = running(cuda)
    session = opened(choice, api, monkeypatch)
    api.calls.clear()
    call(session, 64, profile=1)
    assert [name.partition(".")[2] for name in api.names() if name != ACTIVE] == [
        "set_optimization_profile_async",
        *["set_input_shape", "set_tensor_address"] * 2,
        "get_tensor_shape", "set_tensor_address", "execute_async_v3",
    ]  # fmt: skip
    # The profile stays until another is wanted.
    call(session, 128, profile=1)
    assert counted(api, "IExecutionContext.set_optimization_profile_async") == 1
    call(session, 192, profile=0)
    assert counted(api, "IExecutionContext.set_optimization_profile_async") == 2
    assert cuda.log == ["run on 0"] * 3 and cuda.devices == []


def test_the_second_call_of_the_same_shapes_is_recorded_and_then_repeated(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = running(cuda)
    session = opened(choice, api, monkeypatch)
    call(session, 64)
    call(session, 64, value=2.0)
    # One stream of the session for the run before and for the recording; they wait for each other's work.
    assert cuda.log == ["run on 0", "1 waits for 0", "run on 1", "0 waits for 1", "record"]
    assert counted(api, "ICudaEngine.create_execution_context") == 2
    before = len(api.calls)
    feeds = {"hidden_states": torch.full((1, 64, 4), 3.0), "encoder_hidden_states": torch.zeros(1, 1, 4)}
    first = session.run(feeds, {}, 0)
    call(session, 64, value=4.0)
    assert torch.equal(first, torch.full((1, 64, 4), 6.0))  # the next replay did not write there
    assert len(api.calls) == before
    call(session, 128)  # other shapes are another call
    assert len(session._captured) == 1
    assert cuda.current.cuda_stream == 0


def test_the_oldest_graph_goes_before_the_next_is_made(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def context(engine: Thing) -> Thing:
        kept.append(len(session._captured) if "session" in names else 0)
        return Thing("IExecutionContext", {ACTIVE: 0})

    names: set[str] = set()
    session = opened(choice, running(cuda, ICudaEngine__create_execution_context=context), monkeypatch)
    names.add("session")
    for tokens in (64, 64, 128, 128, 64, 192, 192):
        call(session, tokens)
    assert kept == [0, 0, 1, GRAPHS - 1]
    assert [key[0][1][1] for key in session._captured] == [64, 192]  # 64 was used after 128
    assert "0 ends" in cuda.log


def test_where_no_graph_can_be_recorded_runs_go_on_without_and_say_so_once(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = opened(choice, running(cuda), monkeypatch)
    call(session, 64)
    call(session, 64)
    cuda.fails = "operation not permitted\nwhen stream is capturing"
    for tokens in (128, 128, 128, 64, 192, 192):
        call(session, tokens)
        assert cuda.current.cuda_stream == 0  # a capture that fails leaves its stream behind
    assert session.without_graphs == "operation not permitted when stream is capturing"
    assert not session._captured and cuda.log.count("record") == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"keep-0.7.engine: runs without CUDA graphs ({session.without_graphs})"


def test_memory_that_pytorch_keeps_is_given_to_a_context_that_lacks_it(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = iter([False, True])

    def scarce(engine: Thing) -> Thing | None:
        return Thing("IExecutionContext", {ACTIVE: 0}) if next(room, False) else None

    session = opened(choice, running(cuda, ICudaEngine__create_execution_context=scarce), monkeypatch)
    assert cuda.log == ["empty_cache"]
    call(session, 64)
    call(session, 64)  # no room for a second context: no graph, but an answer
    assert session.without_graphs is not None and "no GPU memory" in session.without_graphs
    with pytest.raises(PpclError, match="no GPU memory for running it"):
        opened(choice, running(cuda, ICudaEngine__create_execution_context=lambda engine: None), monkeypatch)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"IExecutionContext__set_input_shape": False}, r"does not take hidden_states of \[1, 64, 4\].*ppcl-fx build"),
        ({"IExecutionContext__set_tensor_address": lambda c, name, memory: name != "sample"}, "does not write sample"),
        ({"IExecutionContext__set_optimization_profile_async": False}, "does not take profile 1"),
        ({"IExecutionContext__execute_async_v3": False}, "could not run"),
    ],
)
def test_what_tensorrt_refuses_is_one_line(
    answers: Any, words: str, choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(choice, running(cuda, **answers), monkeypatch)
    with pytest.raises(PpclError, match=words) as caught:
        call(session, 64, profile=1)
    assert "\n" not in str(caught.value) and cuda.devices == []


def test_an_output_of_an_unknown_type_is_one_line(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PpclError, match="its output sample is DataType.FP8, which cannot be read here"):
        opened(choice, running(cuda, ICudaEngine__get_tensor_dtype="DataType.FP8"), monkeypatch)
    session = opened(choice, running(cuda, ICudaEngine__get_tensor_dtype="DataType.INT64"), monkeypatch)
    assert session.outputs == {"sample": torch.int64}


def test_another_gpu_is_asked_for_by_its_index(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, Any]] = []

    def load(left: str, index: int, kind: str) -> Any:
        asked.append((index, cuda.devices[-1]))
        return running(cuda)

    monkeypatch.setattr(loading, "load_tensorrt", load)
    second = torch.device("cuda:1")
    TensorRTSession(SessionChoice(TENSORRT, choice.artefact, second))
    assert asked == [(1, second)]


def test_the_weights_of_a_stripped_engine_are_hashed_once_for_all_plugs(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    manifests._mark.cache_clear()  # of the build
    real = manifests.sha256_of
    monkeypatch.setattr(manifests, "sha256_of", lambda path: read.append(Path(path).name) or real(path))
    monkeypatch.setattr(loading, "load_tensorrt", lambda left, index, kind: running(cuda))
    sessions = Sessions()
    for _ in range(3):
        sessions.get(choice, None)  # type: ignore[arg-type]  # an engine has no use for the adapter
        sessions.close()
    assert sorted(read) == ["keep-0.7.bin", "keep-0.7.onnx"]


def test_rtx_makes_its_own_graphs_and_keeps_its_kernels_beside_the_engine(
    rtx: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = running_rtx(cuda)
    session = opened(rtx, api, monkeypatch)
    calls = dict(api.calls)
    assert calls["IRuntimeConfig.cuda_graph_strategy"] == {"value": "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"}
    specialised = calls["IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"]
    assert specialised == {"value": "DynamicShapesKernelSpecializationStrategy.LAZY"}
    for _ in range(4):
        call(session, 64)
    assert cuda.log == ["run on 0"] * 4 and counted(api, "ICudaEngine.create_execution_context") == 1
    kernels = rtx.file.with_name("keep-0.7.engine.cache")
    assert not kernels.exists()
    del session
    gc.collect()
    assert kernels.read_bytes() == b"k"
    session = opened(rtx, running_rtx(cuda), monkeypatch)
    del session
    gc.collect()
    assert kernels.read_bytes() == b"kk"  # what was known, and what is new


def test_the_options_of_the_runtime_reach_rtx(
    rtx: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = running_rtx(cuda)
    options = RuntimeOptions(cuda_graphs=False, specialisation="eager", kernel_cache=False)
    session = opened(replace(rtx, options=options), api, monkeypatch)
    call(session, 64)
    calls = dict(api.calls)
    assert calls["IRuntimeConfig.cuda_graph_strategy"] == {"value": "CudaGraphStrategy.DISABLED"}
    specialised = calls["IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"]
    assert specialised == {"value": "DynamicShapesKernelSpecializationStrategy.EAGER"}
    assert "IRuntimeConfig.create_runtime_cache" not in calls
    with pytest.raises(PpclError, match="specialisation: not one of lazy, eager, none.*did you mean 'lazy'"):
        RuntimeOptions(specialisation="lasy")  # type: ignore[arg-type]


def test_kernels_of_another_card_are_compiled_again(
    rtx: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = rtx.file.with_name("keep-0.7.engine.cache")
    kernels.write_bytes(b"other")
    session = opened(rtx, running_rtx(cuda, IRuntimeCache__deserialize=False), monkeypatch)
    call(session, 64)
    assert "is of another card, driver or version; kernels are compiled again" in caplog.text
    del session
    gc.collect()
    assert kernels.read_bytes() == b"k"


def test_cuda_graphs_can_be_switched_off(
    choice: SessionChoice, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RuntimeOptions(cuda_graphs=False)
    session = opened(replace(choice, options=options), running(cuda), monkeypatch)
    for _ in range(3):
        call(session, 64)
    assert session.without_graphs == "the options switch them off" and cuda.log == ["run on 0"] * 3
