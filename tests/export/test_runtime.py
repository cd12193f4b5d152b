"""An exported folder in the place of a pipeline's transformer: the same pictures, and one line for what cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, ModelMixin

import ppcl_fx
from ppcl_fx import EngineTransformer
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.export import ExportConfig, SamplingRun, compare_artefacts, export, lower
from ppcl_fx.export.runtime import sessions
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.runtime.sessions import choose, profile_of, sizes_of, typed
from ppcl_fx.export.store.manifest import FileMark, Port
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Profile, Range
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.shapes.captions import parse
from ppcl_fx.shapes.checker import check
from ppcl_fx.shapes.score import share_right
from ppcl_fx.tracing import bind, trace

pytestmark = pytest.mark.slow

RUNS = [(1, 3), (4, 6), (7, 9), (10, 14)]
KEEPS = (1.0, 0.7, 0.6, 0.5)
PROMPTS = ["a red circle", "a triangle above a square", "two circles"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PluggableModel, Path]:
    """The shipped pipeline, its pluggable model with untrained students, and that model exported."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    calls = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=1)
    edits = [DepthEdit(stack="transformer_blocks", first=first, last=last) for first, last in RUNS]
    model = ppcl_fx.rewrite(trace(pipeline.transformer, calls.examples()), Plan(edits=[*edits])).eval()
    folder = tmp_path_factory.mktemp("engines")
    sampling = SamplingRun(pipeline, PROMPTS, steps=4, score=share_right)
    export(model, folder, ExportConfig(keep=KEEPS, runs=1), calls=calls, sampling=sampling)
    return pipeline, model, folder


@pytest.fixture(scope="module")
def opened(made: Any) -> EngineTransformer:
    """The exported folder; what a test leaves plugged is of no matter to the others."""
    return EngineTransformer(made[2], device="cpu")


def draw(pipeline: Any, transformer: Any) -> torch.Tensor:
    """Draw one picture for each prompt, with guidance; values from 0 to 255."""
    pipeline.transformer = transformer
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(PROMPTS, num_inference_steps=4, generator=generator, output_type="pt").images
    assert isinstance(pictures, torch.Tensor)
    return (255 * pictures).round()


def a_call(batch: int = 1, height: int = 8, width: int = 8, words: int = 9, channels: int = 27) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, height * width, channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, words, 64, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**kwargs, return_dict=False)[0]
    assert isinstance(result, torch.Tensor)
    return result


# ---- the same pictures -----------------------------------------------------------------------------------------


def test_a_stock_pipeline_draws_the_same_pictures_at_every_ratio(made: Any, opened: Any) -> None:
    (pipeline, model, _), engine = made, opened
    assert engine.keeps == list(KEEPS)
    scores = []
    for keep in KEEPS:
        expected = draw(pipeline, model.plug(keep=keep))
        pictures = draw(pipeline, engine.plug(keep=keep))
        assert pipeline.transformer is engine
        assert (pictures - expected).abs().max() <= 1
        prompts = [parse(text) for text in PROMPTS]
        found = [check(one / 127.5 - 1, prompt) for one, prompt in zip(pictures, prompts, strict=True)]
        assert found == [check(one / 127.5 - 1, prompt) for one, prompt in zip(expected, prompts, strict=True)]
        scores.append(sum(found))
        assert (engine.students, engine.param_count()) == (model.students, model.param_count())
    assert scores[0] > 0
    assert set(engine._sessions.opened) == set(KEEPS)


def test_the_export_compared_whole_runs_and_their_scores(made: Any) -> None:
    folder, scores = made[2], []
    for keep, found in artefacts(folder).items():
        gate = found.manifest.gate
        assert gate is not None and gate.calls is not None and gate.sampling is not None and keep in KEEPS
        assert gate.not_checked == [] and gate.sampling_tolerance == 1e-3
        assert gate.calls.compared == 2 and 0 < gate.calls.relative < 1e-5  # one step, with and without the prompt
        assert gate.sampling.compared == len(PROMPTS) and gate.sampling.transformer_calls == 8
        assert 0 < gate.sampling.relative < 1e-4 and gate.sampling.cosine > 0.999999
        assert gate.sampling.score == gate.sampling.score_pytorch
        scores.append(gate.sampling.score)
    assert len(scores) == len(KEEPS) and scores[0] is not None and scores[0] > 0


def test_pytorch_runs_the_exported_weights_to_the_bit(made: Any) -> None:
    _, model, folder = made
    engine = EngineTransformer(folder, backend="torch", device="cpu")
    for keep in KEEPS[3:]:
        kwargs = a_call(batch=2, height=6, width=10, words=14)
        assert torch.equal(answer(engine.plug(keep=keep), kwargs), answer(model.plug(keep=keep), kwargs))


def test_the_folder_as_it_is_deployed_is_compared(made: Any) -> None:
    _, model, folder = made
    calls = Calls([Call(a_call(batch=batch), ("a",) * batch, 1 / batch, batch, batch) for batch in (1, 2)])
    model.plug(students=model.edits[:1])
    found = compare_artefacts(folder, model, calls, backend="torch", device="cpu", tolerance=0.0)
    assert list(found) == list(KEEPS) and model.students == tuple(model.edits[:1])
    assert {(one.compared, one.relative) for one in found.values()} == {(2, 0.0)}
    assert all(one.cosine == pytest.approx(1.0, abs=1e-15) for one in found.values())
    near = compare_artefacts(folder, model, calls, backend="onnxruntime", device="cpu", check_calls=1)
    assert all(one.compared == 1 and 0 < one.relative < 1e-5 for one in near.values())
    with pytest.raises(PpclError, match=r"the ratio 1 in onnxruntime differs from PyTorch by .* at recorded call 1"):
        compare_artefacts(folder, model, calls, backend="onnxruntime", device="cpu", check_calls=1, tolerance=0.0)
    with pytest.raises(PpclError, match="no recorded calls to compare"):
        compare_artefacts(folder, model, Calls([]))


@pytest.mark.parametrize(
    "sizes", [{"batch": 1}, {"batch": 3, "height": 6, "width": 10, "words": 14}, {"height": 12, "words": 3}]
)
def test_other_resolutions_text_lengths_and_batches(made: Any, opened: Any, sizes: dict[str, int]) -> None:
    model, engine = made[1], opened.plug(keep=0.5)
    model.plug(keep=0.5)
    kwargs = a_call(**sizes)
    for _ in range(2):
        assert torch.allclose(answer(engine, kwargs), answer(model, kwargs), atol=1e-5)
    # The same tables as from the model with its weights, to the bit.
    real = lower(model.graph_module()).feeds(bind(model.graph_module(), kwargs))
    tables = engine._adapter().tables(kwargs)
    assert set(tables) == set(real) - set(kwargs)
    assert all(torch.equal(table, real[name]) for name, table in tables.items())


# ---- as a transformer ------------------------------------------------------------------------------------------


def test_it_has_what_pipelines_ask_for(made: Any, opened: Any) -> None:
    model, engine = made[1], opened.plug(keep=0.5)
    assert isinstance(engine, ModelMixin)
    assert (engine.backend, engine.dtype, engine.device) == ("onnxruntime", torch.float32, torch.device("cpu"))
    assert dict(engine.config) == dict(model.config)
    assert engine.config.in_channels == 27
    kwargs = a_call()
    with engine.cache_context("cond"):
        result = engine(**kwargs)
    hidden = kwargs.pop("hidden_states")
    assert torch.equal(result.sample, engine(hidden, **kwargs, return_dict=False)[0])
    assert engine.to("cpu", torch.float32) is engine
    assert list(engine.parameters()) == []
    with pytest.raises(PpclError, match=r"keep-0.5.onnx computes in float32, and .* cannot be changed to bfloat16"):
        engine.to(torch.bfloat16)
    with pytest.raises(PpclError, match="copy the folder"):
        engine.save_pretrained("anywhere")


@pytest.mark.filterwarnings("ignore:Accessing config attribute")
def test_it_answers_like_the_class_that_was_exported(made: Any, opened: Any) -> None:
    teacher = load_pipeline().transformer
    assert (opened.inner_dim, opened.out_channels) == (teacher.inner_dim, teacher.out_channels)
    assert len(opened.transformer_blocks) == len(teacher.transformer_blocks)
    assert not opened.is_cache_enabled and not hasattr(opened, "rope")
    for words, refused in {
        "load it into the pluggable model, fuse it there": lambda: opened.load_lora_adapter({}),
        "no weights of its own to offload": lambda: opened.enable_group_offload("cpu"),
        "no kernels to choose": lambda: opened.set_attention_backend("native"),
        "no layerwise casting": lambda: opened.enable_layerwise_casting(torch.float8_e4m3fn),
        "enable_cache.. changes": lambda: opened.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
    }.items():
        with pytest.raises(PpclError, match=words):
            refused()
    with opened.cache_context("cond", step_index=0, sigma=torch.tensor(1.0)):
        pass


def test_files_are_opened_when_they_are_called(made: Any) -> None:
    engine = EngineTransformer(made[2], device="cpu")
    assert engine.keep == 1.0
    assert engine._sessions.opened == {}
    answer(engine.plug(keep=0.5), a_call())
    first = dict(engine._sessions.opened)
    answer(engine, a_call())
    assert engine._sessions.opened == first
    assert list(first) == [0.5]


# ---- what is refused -------------------------------------------------------------------------------------------


def test_an_unknown_ratio_gets_a_near_one(made: Any) -> None:
    _, _, folder = made
    with pytest.raises(PpclError, match=r"no ratio 0.55 \(did you mean '0.5'\?\); it has 1, 0.7, 0.6, 0.5") as caught:
        EngineTransformer(folder).plug(keep=0.55)
    assert "\n" not in str(caught.value)
    with pytest.raises(PpclError, match=r"no backend 'onnx' \(did you mean 'onnxruntime'\?\)"):
        EngineTransformer(folder, backend="onnx")
    with pytest.raises(PpclError, match="TensorRT runs on NVIDIA GPUs, not on cpu; use backend='onnxruntime'"):
        EngineTransformer(folder, backend="tensorrt", device="cpu")


def test_a_missing_runtime_is_named_and_another_is_taken(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, folder = made
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PpclError, match=r'onnxruntime is not installed: pip install "ppcl-fx\[export\]"'):
        EngineTransformer(folder, backend="onnxruntime", device="cpu")
    assert EngineTransformer(folder, device="cpu").backend == "torch"
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(PpclError, match=r'pip install "ppcl-fx\[export\]"; nothing here can run'):
        EngineTransformer(folder, device="cpu")


def test_calls_outside_of_what_was_exported(opened: Any) -> None:
    engine = opened.plug(keep=0.5)
    kwargs = a_call(channels=28)
    with pytest.raises(PpclError, match=r"keep-0.5.onnx takes hidden_states \[.*, 27\], and dimension 2 .* is 28"):
        answer(engine, kwargs)
    kwargs = a_call() | {"img_shapes": [[(1, 4, 8)]]}
    with pytest.raises(PpclError, match=r"hidden_states_1 is 32 here but 64 in hidden_states; make them equal"):
        answer(engine, kwargs)
    with pytest.raises(PpclError, match="the input 'timestep' is torch.int64"):
        answer(engine, a_call() | {"timestep": torch.tensor([500])})
    with pytest.raises(GuardError, match="guidance"):
        answer(engine, a_call() | {"guidance": torch.ones(1)})


def test_ranges_of_a_profile() -> None:
    ports = [Port(name="x", dtype="float", shape=["batch", "x_1", 4]), Port(name="t", dtype="float", shape=["batch"])]
    small = {"batch": Range(min=1, opt=2, max=4), "x_1": Range(min=16, opt=16, max=64)}
    large = {"batch": Range(min=1, opt=1, max=1), "x_1": Range(min=16, opt=256, max=256)}

    def taken(batch: int, tokens: int, times: int) -> int:
        feeds = {"x": torch.zeros(batch, tokens, 4), "t": torch.zeros(times)}
        sizes = sizes_of("keep-0.7.engine", ports, feeds)
        assert sizes == {"batch": batch, "x_1": tokens}
        return profile_of("keep-0.7.engine", sizes, [small, large], "run: COMMAND")

    assert [taken(4, 64, 4), taken(1, 200, 1), taken(1, 16, 1)] == [0, 1, 0]
    assert profile_of("keep-0.7.onnx", {"batch": 99}, [], "") == 0
    # Of profiles that fit the tightest, and of equals the first.
    tight = {"batch": Range(min=1, opt=1, max=1), "x_1": Range(min=64, opt=64, max=64)}
    profiles = [large, small, tight, tight]
    assert [profile_of("", {"batch": 1, "x_1": size}, profiles, "") for size in (64, 63, 65)] == [2, 1, 0]
    with pytest.raises(PpclError, match=r"^keep-0.7.engine is not for batch 5 \(it takes 1 to 4\); run: COMMAND$"):
        taken(5, 64, 5)
    with pytest.raises(PpclError, match=r"not for x_1 8 \(it takes 16 to 256\)|not for x_1 8 \(it takes 16 to 64\)"):
        taken(1, 8, 1)
    with pytest.raises(PpclError, match="batch is 3 here but 2 in x; make them equal"):
        taken(2, 16, 3)
    with pytest.raises(PpclError, match="batch of this call is 0; give at least one"):
        taken(0, 16, 0)
    assert typed(ports[1], torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_ratio_with_an_engine(made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(made[2], folder)
    manifest, mark = artefacts(folder)[0.7].manifest, FileMark(bytes=6, sha256="0" * 64)
    graph = FileMark(bytes=manifest.size, sha256=manifest.sha256)
    card = EngineManifest(
        file="keep-0.7.engine", engine=mark, onnx="keep-0.7.onnx", graph=graph, weights={}, dtype="bfloat16",
        keep=0.7, students=manifest.students, plan=manifest.plan, tensorrt="11.4.0", cuda="13.0", gpu="NVIDIA H100",
        capability="9.0",
        profiles=[Profile(sizes={"batch": Range(min=1, opt=1, max=2)})], options=BuildOptions(), inputs=manifest.inputs,
        outputs=manifest.outputs, timing_cache=None, seconds=1.0,
    )  # fmt: skip
    engine = folder / card.file
    engine.write_bytes(b"engine")
    engine.with_name(f"{card.file}.json").write_text(card.model_dump_json())
    found = artefacts(folder)
    assert [one.engine for one in found.values()] == [None, engine, None, None]
    with pytest.raises(PpclError, match="no engine for the ratio 0.5; run: ppcl-fx build"):
        choose(found[0.5], "tensorrt", torch.device("cuda"))
    # On a CPU the engine is not looked at: its ratio runs from its ONNX file.
    assert EngineTransformer(folder, keep=0.7, device="cpu").backend == "onnxruntime"


def test_a_device_that_is_none_is_one_line(made: Any, opened: Any) -> None:
    with pytest.raises(PpclError, match="no device 'nonsense'"):
        EngineTransformer(made[2], keep=0.5, device="nonsense")
    with pytest.raises(PpclError, match="give cpu, cuda or cuda:1") as caught:
        opened.to("nonsense")
    assert "\n" not in str(caught.value)


def test_a_damaged_folder(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made[2]
    with pytest.raises(PpclError, match="holds no exported ratio"):
        EngineTransformer(tmp_path)
    copy = tmp_path / "engines"
    shutil.copytree(folder, copy)
    weights = copy / artefacts(copy)[0.5].manifest.weights[0].file
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(PpclError, match=f"has 1000 bytes, and {len(whole)} were written"):
        EngineTransformer(copy)
    weights.write_bytes(whole)
    (copy / "keep-0.5.onnx").write_bytes(b"no graph")
    with pytest.raises(PpclError, match="keep-0.5.onnx: not an ONNX file"):
        answer(EngineTransformer(copy, keep=0.5, device="cpu"), a_call())
    monkeypatch.setattr(sessions, "check_artefacts", lambda *_, **__: [])  # what the backends themselves say
    for backend, words in (("onnxruntime", "onnxruntime does not open it"), ("torch", "not an ONNX file")):
        with pytest.raises(PpclError, match=words) as caught:
            answer(EngineTransformer(copy, keep=0.5, backend=backend, device="cpu"), a_call())
        assert "\n" not in str(caught.value)
    (copy / "keep-0.7.onnx").unlink()
    with pytest.raises(PpclError, match=r"keep-0.7.onnx: no such file, and keep-0.7.json names it"):
        EngineTransformer(copy)
    manifest = json.loads((copy / "keep-0.7.json").read_text())
    (copy / "keep-0.7.json").write_text(json.dumps(manifest | {"file": "../keep-0.7.onnx"}))
    with pytest.raises(PpclError, match="keep-0.7.json: was changed after it was written"):
        EngineTransformer(copy)
    (copy / "keep-0.7.json").write_text(json.dumps(manifest | {"file": "../keep-0.7.onnx", "seal": ""}))
    with pytest.raises(PpclError, match="leaves its folder"):
        EngineTransformer(copy)
    (copy / "keep-0.7.json").unlink()
    (copy / "head.json").unlink()
    with pytest.raises(PpclError, match="head.json: no such file"):
        EngineTransformer(copy)
