"""A pluggable model inside of stock pipelines: dtypes, offloading, compilation, attention backends, LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, ModelMixin
from diffusers.hooks import group_offloading
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch.fx import GraphModule

import ppcl_fx
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.model.face import Pieces
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.tracing import trace
from tests import models, toys
from tests.lora import loras
from tests.passes.by_hand import randomise
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
EDITS: list[Edit] = [
    DepthEdit(stack=STACK, first=1, last=2),
    FfnEdit(stack=STACK, block=4),
    TextStreamEdit(stack=STACK, source=3, last=5),
]
HALF = [(1, 3), (4, 6), (7, 9), (10, 14)]
"""Intervals of the shipped model that leave half of its parameters: 10 of 16 blocks go."""


class LoraPipeline(ShapesPipeline, QwenImageLoraLoaderMixin):  # type: ignore[misc]
    """The shapes pipeline with the LoRA methods of diffusers' Qwen-Image pipeline."""


def draw(pipeline: Any, steps: int = 2) -> torch.Tensor:
    """Draw a small picture with a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline("a red circle", num_inference_steps=steps, generator=generator, output_type="pt").images
    assert isinstance(result, torch.Tensor)
    return result


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


def converted(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


@pytest.fixture
def tiny() -> tuple[Any, PluggableModel, dict[str, Any]]:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS))
    randomise(model.graph)
    return models.tiny_qwen()[0], model, kwargs


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline, a pluggable model of its transformer, and a LoRA for it."""
    folder = tmp_path_factory.mktemp("shapes")
    pipeline = ShapesPipeline.from_pretrained(save_pipeline(folder / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    calls = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=2)
    gm = trace(pipeline.transformer, calls.examples())
    rewrite(gm, Plan(edits=EDITS), calls).save(folder / "student")
    return folder


def student(folder: Path) -> PluggableModel:
    model = ppcl_fx.load(folder / "student")
    return model.plug(students=model.edits)


# ---- pipelines and dtypes --------------------------------------------------------------------------------------


def test_a_stock_pipeline_takes_it_as_its_transformer(shapes_folder: Path) -> None:
    model = student(shapes_folder)
    assert isinstance(model, ModelMixin)
    pipeline = ShapesPipeline.from_pretrained(shapes_folder / "pipeline", transformer=model)
    teacher = ShapesPipeline.from_pretrained(shapes_folder / "pipeline")
    assert pipeline.transformer is model
    assert not torch.equal(draw(pipeline), draw(teacher))
    model.plug(students=[])
    assert torch.equal(draw(pipeline), draw(teacher))


@pytest.mark.parametrize("move", [lambda p: p.to(torch.bfloat16), lambda p: p.transformer.bfloat16()])
def test_a_pipeline_is_moved_to_another_dtype(shapes_folder: Path, move: Any) -> None:
    model = student(shapes_folder)
    pipeline = ShapesPipeline.from_pretrained(shapes_folder / "pipeline", transformer=model)
    exact = draw(pipeline)
    move(pipeline)
    assert pipeline.transformer.dtype == torch.bfloat16
    rounded = draw(pipeline)
    assert 0 < (rounded - exact).abs().max() < 0.05
    teacher = ShapesPipeline.from_pretrained(shapes_folder / "pipeline")
    move(teacher)
    model.plug(students=[])
    assert torch.equal(draw(pipeline), draw(teacher))
    # What the students became is what loading in that dtype gives.
    loaded = ppcl_fx.load(shapes_folder / "student", dtype=torch.bfloat16)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


SINGLE = "single_transformer_blocks"
OTHERS: dict[str, list[Edit]] = {
    "tiny_qwen": EDITS,
    "tiny_flux": [DepthEdit(stack=STACK, first=1, last=2), DepthEdit(stack=SINGLE, first=1, last=3)],
    "tiny_sd3": [DepthEdit(stack=STACK, first=0, last=1), FfnEdit(stack=STACK, block=7)],
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_moving_there_and_back_is_the_model_loaded_in_both(name: str) -> None:
    teacher, kwargs = getattr(models, name)()
    model = rewrite(trace(teacher, kwargs), Plan(edits=OTHERS[name]))
    teacher = getattr(models, name)()[0]
    before = {name: tensor.bfloat16().float() for name, tensor in model.graph.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        teacher.to(dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        model.plug(students=model.edits)
        assert answer(model, converted(kwargs, dtype)).isfinite().all()
        model.plug(students=[])
        other = converted(models.other_kwargs(teacher), dtype)
        assert torch.equal(answer(model, other), answer(teacher, other))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.graph.state_dict().items())


def test_a_move_keeps_parameters_and_switches(tiny: Any) -> None:
    _, model, kwargs = tiny
    model.plug(students=model.edits)
    parameters = dict(model.named_parameters())
    model.half()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model.students == tuple(model.edits)
    assert model.param_count() < model.teacher_params == sum(p.numel() for p in models.tiny_qwen()[0].parameters())
    assert model.graph.meta["ppcl"]["example"]["hidden_states"]["tensor"]["dtype"] == "float16"
    with pytest.raises((GuardError, RuntimeError)):
        answer(model, kwargs)


def test_a_model_of_no_known_class_keeps_its_dtype() -> None:
    plan = Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)])
    model = rewrite(trace(toys.build(toys.Toy), toys.example()), plan)
    with pytest.raises(PpclError, match="traced from no class of diffusers, so it cannot be traced again"):
        model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.to("cpu") is model


def test_it_is_saved_and_loaded_by_diffusers_names(tiny: Any, tmp_path: Path) -> None:
    _, model, kwargs = tiny
    model.plug(students=model.edits).save_pretrained(tmp_path / "student")
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PpclError, match="no ppcl.json there says"):
        model.save_pretrained(tmp_path / "mine")
    loaded = PluggableModel.from_pretrained(tmp_path / "student", torch_dtype=torch.float32)
    assert torch.equal(answer(loaded, kwargs), answer(model, kwargs))


# ---- compilation, attention, offloading ------------------------------------------------------------------------


@pytest.mark.parametrize("students", [[], [edit.id for edit in EDITS]])
def test_it_compiles_in_one_piece(tiny: Any, students: list[str]) -> None:
    _, model, kwargs = tiny
    model.plug(students=students)
    expected = answer(model, kwargs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(answer(compiled, kwargs), expected)
    other = models.other_kwargs(models.tiny_qwen()[0])
    assert torch.equal(answer(compiled, other), answer(model, other))


def test_attention_backends(tiny: Any) -> None:
    _, model, kwargs = tiny
    model.plug(students=model.edits)
    expected = answer(model, kwargs)
    try:
        model.set_attention_backend("_native_math")
        assert torch.allclose(answer(model, kwargs), expected, atol=1e-5)
        with pytest.raises(ValueError, match="must be one of the following"):
            model.set_attention_backend("none such")
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()
    assert torch.equal(answer(model, kwargs), expected)


def test_offloading_the_whole_model_cuts_no_new_mixture(tiny: Any) -> None:
    _, model, kwargs = tiny
    model.plug(students=model.edits)
    expected = answer(model, kwargs)
    _, hook = cpu_offload_with_hook(model, "cpu")
    view = model.graph_module()
    for _ in range(2):
        assert torch.equal(answer(model, kwargs), expected)
    assert model.graph_module() is view
    hook.offload()
    hook.remove()
    assert torch.equal(answer(model, kwargs), expected)


def test_group_offloading_goes_block_by_block(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, kwargs = tiny
    expected = {}
    for students in ((), tuple(model.edits)):
        expected[students] = answer(model.plug(students=students), kwargs)
    moves: list[int] = []
    onload = group_offloading.ModuleGroup.onload_

    def counted(group: Any) -> None:
        moves.append(sum(p.numel() for module in group.modules for p in module.parameters()))
        onload(group)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", counted)
    model.enable_group_offload("cpu", num_blocks_per_group=1)
    assert group_offloading._is_group_offload_enabled(model)
    assert group_offloading._get_group_onload_device(model) == torch.device("cpu")
    for students, blocks in (((), 6), (tuple(model.edits), 5)):
        model.plug(students=students)
        moves.clear()
        assert torch.equal(answer(model, kwargs), expected[students])
        # The pieces with a block each, the rest, and the model itself, which has no weights of its own to move.
        assert len(moves) == blocks + 2
        assert max(moves) < 0.3 * model.param_count()
    with pytest.raises(PpclError, match="offloaded by blocks, so it is not moved"):
        model.to("cpu")
    with pytest.raises(PpclError, match="offloaded already"):
        model.enable_group_offload("cpu")


def test_what_cannot_be_right_is_refused(tiny: Any) -> None:
    _, model, _ = tiny
    with pytest.raises(PpclError, match="use offload_type='block_level'"):
        model.enable_group_offload("cpu", offload_type="leaf_level")
    with pytest.raises(PpclError, match="compile it whole"):
        model.compile_repeated_blocks()
    with pytest.raises(PpclError, match="layerwise casting"):
        model.enable_layerwise_casting(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["tiny_qwen", "tiny_flux", "tiny_sd3"])
def test_pieces_compute_what_the_graph_computes(name: str) -> None:
    model, kwargs = getattr(models, name)()
    gm = trace(model, kwargs)
    inputs = {key: value for key, value in kwargs.items() if key in gm.meta["ppcl"]["inputs"]}
    pieces = Pieces(gm)
    assert all(isinstance(block, GraphModule) for block in pieces.blocks)
    assert len(pieces.blocks) == len(gm.meta["ppcl"]["blocks"]) + 1
    assert {id(p) for p in pieces.parameters()} == {id(p) for p in gm.parameters()}
    with torch.no_grad():
        assert torch.equal(pieces(**inputs)[0], model(**kwargs)[0])


# ---- LoRA ------------------------------------------------------------------------------------------------------


def test_a_stock_pipeline_loads_a_lora_onto_the_student_of_half_the_size(tmp_path: Path) -> None:
    source = open_source("shapes").pipeline()
    folder = loras.save(open_source("shapes").transformer(), tmp_path / "lora")
    calls = ppcl_fx.record(source, ["a red circle"], num_inference_steps=1)
    edits = [DepthEdit(stack=STACK, first=first, last=last) for first, last in HALF]
    model = rewrite(trace(source.transformer, calls.examples()), Plan(edits=list[Edit](edits))).plug(keep=0.5)
    assert model.param_count() <= 0.5 * model.teacher_params
    pipeline = LoraPipeline(model, source.scheduler, source.text_encoder)
    before, plain = {n: t.clone() for n, t in model.state_dict().items()}, draw(pipeline)
    pipeline.load_lora_weights(folder, weight_name=loras.FILE, adapter_name="style")
    report = model.lora_report("style")
    # 16 blocks of nine layers and the last layer; of the ten blocks that go, four are students.
    assert (report.layers, report.kept, report.students, report.removed) == (145, 19, 36, 90)
    full = draw(pipeline)
    assert pipeline.get_list_adapters() == {"transformer": ["style"]}
    pipeline.set_adapters("style", 0.5)
    weak = draw(pipeline)
    assert not torch.equal(full, plain)
    assert not torch.equal(weak, full)
    assert not torch.equal(weak, plain)
    pipeline.disable_lora()
    assert torch.equal(draw(pipeline), plain)
    pipeline.enable_lora()
    assert torch.equal(draw(pipeline), weak)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_flux_s_own_pipeline_loads_and_unloads_a_lora(tmp_path: Path) -> None:
    folder = loras.save(models.tiny_flux()[0], tmp_path)
    teacher, kwargs = models.tiny_flux()
    model = rewrite(trace(teacher, kwargs), Plan(edits=[DepthEdit(stack=STACK, first=1, last=2)]))
    before = answer(model, kwargs)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    pipeline.load_lora_weights(folder, weight_name=loras.FILE, adapter_name="style")
    assert torch.equal(answer(model, kwargs), answer(loras.fused(models.tiny_flux()[0], folder), kwargs))
    assert pipeline.get_active_adapters() == ["style"]
    pipeline.fuse_lora()
    assert pipeline.fused_loras == {"style"}
    pipeline.unfuse_lora()
    assert pipeline.fused_loras == set()
    pipeline.unload_lora_weights()
    assert torch.equal(answer(model, kwargs), before)
    assert pipeline.get_active_adapters() == []
