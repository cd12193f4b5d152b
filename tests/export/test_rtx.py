"""TensorRT for RTX: engines that NVIDIA's own compiler builds here, without a GPU, and what it refuses.

Nothing is run: an engine needs a card for that. What a runtime does with one is checked against the signatures of
NVIDIA's bindings.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ppcl_fx.cli.app import main
from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import mark_of
from ppcl_fx.export.tensorrt import process
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.folder import build_folder
from ppcl_fx.export.tensorrt.loading import invalid, load_engine
from ppcl_fx.export.tensorrt.manifest import EngineManifest, read_engine_manifest
from ppcl_fx.export.tensorrt.monitor import Messages
from ppcl_fx.export.tensorrt.options import PORTABLE, BuildOptions
from ppcl_fx.export.tensorrt.profiles import Profile, Range, Spec, check_agreement
from ppcl_fx.export.tensorrt.request import BuildConfig, read_request
from ppcl_fx.export.tensorrt_api import Gpu, find_gpu, load_builder, load_tensorrt, short
from tests.export.compiler import NEEDS
from tests.export.fake_trt import working
from tests.export.test_tensorrt import PROFILE, SPEC, write_graph

pytestmark = NEEDS
QUICK = BuildOptions(gpu=("8.9",), level=0)
VERSION = "1.7.1.116"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "keep-0.7.onnx")


def two_inputs(path: Path, operator: str = "Add") -> Path:
    """A graph whose two inputs have to be of one length, which their names do not say."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def tensor(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], struct.pack("<16f", *[0.5] * 16), raw=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="blocks.1/0/node_MatMul"),
        helper.make_node(operator, ["m", "table"][: 2 if operator == "Add" else 1], ["z"], name="blocks.1/0/node_last"),
    ]
    inputs = [tensor("x", "batch", "tokens", 4), tensor("table", "batch", "positions", 4)]
    outputs = [tensor("z", "batch", *(("tokens", 4) if operator == "Add" else ()))]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", 23)]
    )
    onnx.save(model, path)
    return path


def built(graph: Path, options: BuildOptions = QUICK, **more: Any) -> EngineManifest:
    api = load_builder("the ONNX file stays", "rtx")
    return build_engine(graph, graph.with_suffix(".engine"), [PROFILE], options, api=api, **more)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_engine_is_built_without_a_gpu_and_says_what_it_is(graph: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    card = built(graph, cache=graph.parent / "t.cache", report=lambda *step: seen.append(step))
    engine = graph.with_suffix(".engine")
    assert files(graph.parent) == ["keep-0.7.engine", "keep-0.7.engine.json", "keep-0.7.onnx", "weights"]
    assert read_engine_manifest(engine) == card and card.engine == mark_of(engine)
    assert (card.library, card.tensorrt, card.capabilities) == ("rtx", VERSION, ["8.9"])
    assert (card.gpu, card.capability, card.cuda, card.timing_cache) == (None, None, None, None)
    assert card.layers == 3  # the input, the weight and their product
    assert card.peak_memory is not None and 2**25 < card.peak_memory < 2**31
    assert card.profiles == [PROFILE] and card.options == QUICK and "not compared" in card.not_checked[0]
    assert [step for step, _, _ in seen] == sorted(step for step, _, _ in seen) and seen[-1][0] == 100


def test_the_portable_set_is_built_for_unless_cards_are_named(graph: Path) -> None:
    assert built(graph, BuildOptions(level=0)).capabilities == list(PORTABLE)
    assert built(graph, BuildOptions(level=0, gpu=("12.0", "8.6"), weight_streaming=1)).capabilities == ["8.6", "12.0"]


def test_a_folder_is_built_from_what_its_request_says(tmp_path: Path, capsys: Any) -> None:
    write_graph(tmp_path / "keep-1.onnx")
    sizes = ["--tokens", "64-4096", "--batch", "1-4", "--text", "1-512", "--gpu", "8.9", "--level", "0"]
    assert main(["build", str(tmp_path), "--for", "rtx", *sizes, "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["card"]["library"] == "rtx" and engine["card"]["capabilities"] == ["8.9"]
    assert read_request(tmp_path) == BuildConfig(spec=SPEC, options=QUICK, library="rtx")
    # The folder says for what; the engine that is there fits, however much memory the next build may take.
    assert main(["build", str(tmp_path), "--builder-memory", "4GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["kept"]
    assert main(["build", str(tmp_path), "--gpu", "8.6"]) == 2
    assert "other profiles or options; replace it with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--for", "rtxx"], "--for rtxx: not one of tensorrt, rtx (did you mean 'rtx'?)"),
        (["--for", "rtx", "--gpu", "8.7"], "--gpu 8.7: TensorRT for RTX builds for no such compute capability (did"),
        (["--for", "rtx", "--stripped"], "--stripped: TensorRT for RTX builds without a GPU"),
        (["--for", "rtx", "--refit", "any"], "--refit any: TensorRT for RTX builds without a GPU"),
        (["--gpu", "8.9"], "--gpu 8.9: TensorRT builds for the GPU of the machine that it runs on"),
        (["--for", "rtx", "--builder-memory", "much"], "--builder-memory much: not a size"),
    ],
)
def test_what_a_library_does_not_do_is_one_line(
    arguments: list[str], words: str, graph: Path, capsys: Any
) -> None:
    before = files(graph.parent)
    assert main(["build", str(graph.parent), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert files(graph.parent) == before


def test_the_options_of_an_export_are_refused_before_any_work(tmp_path: Path, capsys: Any) -> None:
    for arguments, words in (
        (["--format", "rtx", "--stripped"], "--stripped: TensorRT for RTX"),
        (["--format", "tensorrt", "--gpu", "8.9"], "--gpu 8.9: TensorRT builds"),
        (["--gpu", "8.9"], "--gpu: only for --format tensorrt or rtx or trtexec"),
    ):
        assert main(["export", str(tmp_path / "x"), "-o", str(tmp_path / "y"), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert files(tmp_path) == []


def test_sizes_that_contradict_each_other_are_found_before_the_compiler_sees_them(tmp_path: Path) -> None:
    graph = two_inputs(tmp_path / "keep-1.onnx")
    agreed = Spec(batch="1-2", tokens="8-16", sizes={"positions": "8-16"})
    assert len(BuildConfig(spec=agreed).profiles(graph)) == 1
    other = Spec(batch="1-2", tokens="8-16", sizes={"positions": "8-12-16"})
    words = "contradict each other: .*tokens 16.*Add blocks.1/0/node_last.*give sizes that agree"
    with pytest.raises(PpclError, match=words) as e:
        build_folder(tmp_path, BuildConfig(spec=other, library="rtx", options=QUICK))
    assert "\n" not in str(e.value) and files(tmp_path) == ["keep-1.onnx"]


def test_a_table_of_other_positions_than_there_are_tokens_is_a_contradiction(tmp_path: Path) -> None:
    def tensor(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"], name="blocks.0/1/rotary")
    shape = ["batch", 2, "tokens", 8]
    tables = [tensor(name, "batch", "positions", 4) for name in ("cos", "sin")]
    made = helper.make_graph([node], "graph", [tensor("x", *shape), *tables], [tensor("y", *shape)])
    path = tmp_path / "keep-1.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)]), path)
    check_agreement(path, [sizes(batch=2, tokens=9, positions=9)])
    with pytest.raises(PpclError, match="RotaryEmbedding blocks.0/1/rotary: 9 tokens, and 8 in cos.; give sizes"):
        check_agreement(path, [sizes(batch=2, tokens=9, positions=8)])


def sizes(**given: int) -> Profile:
    return Profile(name="p", sizes={name: Range(min=1, opt=size, max=size) for name, size in given.items()})


def test_what_the_compiler_refuses_is_its_own_words_in_one_line(tmp_path: Path) -> None:
    graph, api = two_inputs(tmp_path / "keep-1.onnx"), load_builder("", "rtx")
    with pytest.raises(PpclError) as caught:
        build_engine(graph, tmp_path / "a.engine", [sizes(batch=1, tokens=8, positions=7)], QUICK, api=api)
    assert "TensorRT for RTX could not build an engine" in str(caught.value) and "7 != 8" in str(caught.value)
    assert "/_src/" not in str(caught.value) and "\n" not in str(caught.value)
    turing = BuildOptions(gpu=("7.5",), level=0)
    with pytest.raises(PpclError, match="Turing .SM75.: FP32 GEMM is not supported") as caught:
        build_engine(graph, tmp_path / "a.engine", [sizes(batch=1, tokens=8, positions=8)], turing, api=api)
    assert files(tmp_path) == ["keep-1.onnx"]


def test_an_operator_that_the_parser_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    graph, api = two_inputs(tmp_path / "keep-1.onnx", "Det"), load_builder("", "rtx")
    with pytest.raises(PpclError, match=r"parser refuses it \(Det in blocks.1 \(blocks.1/0/node_last\): ") as caught:
        build_engine(graph, tmp_path / "a.engine", [sizes(batch=1, tokens=4, positions=4)], QUICK, api=api)
    assert "\n" not in str(caught.value) and files(tmp_path) == ["keep-1.onnx"]


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("SIGSEGV", r"ended by itself, SIGSEGV \(at 'Building engine'; no tactic for 'mm'\)"),
        ("SIGKILL", "SIGKILL, for want of memory perhaps"),
    ],
)
def test_a_compiler_that_dies_is_one_line_with_its_last_words(
    by: str, words: str, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "WORKER", "tests.export.dying")
    monkeypatch.setenv("DYING_BY", by)
    with pytest.raises(PpclError, match=words) as caught:
        built(graph)
    assert "\n" not in str(caught.value) and files(graph.parent) == ["keep-0.7.onnx", "weights"]


def test_a_build_that_takes_too_much_memory_is_ended(graph: Path) -> None:
    with pytest.raises(PpclError, match=r"more than --builder-memory allows \(16.0 MiB\)"):
        built(graph, QUICK.model_copy(update={"builder_memory": 2**24}))
    assert files(graph.parent) == ["keep-0.7.onnx", "weights"]


def test_ctrl_c_ends_the_process_and_leaves_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = process.subprocess.Popen

    def remembered(*args: Any, **more: Any) -> Any:
        started.append(popen(*args, **more))
        return started[0]

    def interrupted(done: int, total: int, phase: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.subprocess, "Popen", remembered)
    with pytest.raises(KeyboardInterrupt):
        built(graph, report=interrupted)
    assert started[0].poll() is not None
    assert files(graph.parent) == ["keep-0.7.onnx", "weights"]


# A message that only machines without a card give.
@pytest.mark.skipif(find_gpu() is not None, reason="with a GPU there is nothing to refuse")
def test_the_library_runs_on_a_gpu_alone(graph: Path) -> None:
    built(graph)
    with pytest.raises(PpclError, match=r'TensorRT for RTX runs on one: pip install "ppcl-fx\[rtx\]" there; .* stays'):
        load_engine(graph.with_suffix(".engine"))
    with pytest.raises(PpclError, match="no NVIDIA GPU"):
        load_tensorrt("", 0, "rtx")


def test_a_damaged_engine_is_found_by_the_real_library(graph: Path) -> None:
    api = load_builder("", "rtx")
    runtime = api.make("Runtime", logger=Messages(api).logger)
    assert invalid(api, runtime, b"x" * 1000) == "it is damaged"
    assert invalid(api, runtime, b"") == "it is damaged"


CARD = Gpu("NVIDIA GeForce RTX 4090", "8.9", "13.0")


def running(**more: Any) -> Any:
    valid = {"Runtime__get_engine_validity": ("EngineValidity.VALID", 0)}
    return working(kind="rtx", version=more.pop("version", VERSION), gpu=more.pop("gpu", CARD), **(valid | more))


@pytest.mark.parametrize(
    ("api", "words"),
    [
        ({"gpu": Gpu("NVIDIA H100", "9.0", "13.0")}, "for cards of compute capability 8.9, and this is NVIDIA H100"),
        ({"version": "1.8.0.1"}, f"built with TensorRT for RTX {VERSION}, and this is 1.8.0.1"),
        ({"Runtime__get_engine_validity": ("EngineValidity.INVALID", 0)}, "the library says that it is not valid here"),
        ({"Runtime__deserialize_cuda_engine": None}, "TensorRT for RTX cannot read it"),
    ],
)
def test_an_engine_that_does_not_belong_here_is_one_line(api: dict[str, Any], words: str, graph: Path) -> None:
    built(graph)
    assert load_engine(graph.with_suffix(".engine"), api=running()).manifest.library == "rtx"
    with pytest.raises(PpclError, match=words) as caught:
        load_engine(graph.with_suffix(".engine"), api=running(**api))
    assert "\n" not in str(caught.value) and "ppcl-fx build" in str(caught.value)
    with pytest.raises(PpclError, match="built with TensorRT for RTX, and this is TensorRT;"):
        load_engine(graph.with_suffix(".engine"), api=working())


def test_a_librarys_words_lose_its_own_places() -> None:
    said = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot "
        "compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported. In compileGraph at /_src/a/b.cpp:2012)"
    )
    assert short(said) == "Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported"
    assert short("no Foo\n here") == "no Foo here"
