"""LoRA by the teacher's block numbers: the fused teacher to the bit, exact unloading, counts, refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl_fx.errors import PpclError
from ppcl_fx.lora import LoraReport
from ppcl_fx.lora.keys import read_lora
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models
from tests.lora import loras
from tests.passes.by_hand import randomise

pytestmark = pytest.mark.slow

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
EDITS: dict[str, list[Edit]] = {
    "qwen": [
        DepthEdit(stack=DUAL, first=1, last=2),
        FfnEdit(stack=DUAL, block=4),
        TextStreamEdit(stack=DUAL, source=3, last=5),
    ],
    "flux": [DepthEdit(stack=DUAL, first=0, last=1), DepthEdit(stack=SINGLE, first=1, last=3)],
    "sd3": [DepthEdit(stack=DUAL, first=0, last=1), FfnEdit(stack=DUAL, block=5)],
}
FILE = loras.FILE
Case = tuple[str, dict[str, Any], PluggableModel, Path]


@pytest.fixture(scope="module", params=list(BUILD))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    teacher, kwargs = BUILD[name]()
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS[name]))
    randomise(model.graph) if hasattr(model.graph, "projectors") else None
    folder = loras.save(BUILD[name]()[0], tmp_path_factory.mktemp("lora"))
    return name, kwargs, model, folder


@pytest.fixture
def bare(case: Case) -> Any:
    yield case
    case[2].unload_lora()
    case[2].plug(students=[])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[PluggableModel, dict[str, Any], Path]:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS["qwen"]))
    randomise(model.graph)
    return model, kwargs, loras.save(models.tiny_qwen()[0], tmp_path_factory.mktemp("lora"))


@pytest.fixture
def plain(qwen: tuple[PluggableModel, dict[str, Any], Path]) -> Any:
    yield qwen
    qwen[0].unload_lora()
    qwen[0].plug(students=[])


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


def weights(model: PluggableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.graph.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_with_every_edit_at_the_teacher_it_is_the_fused_teacher_to_the_bit(bare: Case) -> None:
    name, kwargs, model, folder = bare
    before, output = weights(model), answer(model, kwargs)
    reference = loras.fused(BUILD[name]()[0], folder)
    report = model.load_lora_adapter(folder)
    assert report is not None
    assert (report.layers, report.removed, report.projectors) == (report.kept, 0, 0)
    assert not torch.allclose(answer(model, kwargs), output, atol=1e-3)
    for given in (kwargs, models.other_kwargs(BUILD[name]()[0])):
        assert torch.equal(answer(model, given), answer(reference, given))
    model.unload_lora()
    assert same(weights(model), before)
    assert torch.equal(answer(model, kwargs), output)


def test_a_student_block_takes_what_its_first_block_gets(bare: Case) -> None:
    name, kwargs, model, folder = bare
    model.plug(students=model.edits)
    before, output = weights(model), answer(model, kwargs)
    reference = loras.fused(BUILD[name]()[0], folder).state_dict()
    report = model.load_lora_adapter(folder)
    assert report is not None
    edit = next(e for e in EDITS[name] if isinstance(e, DepthEdit))
    there = f"students.{edit.stack}_{edit.first}_{edit.last}."
    mine = {n.removeprefix(there): t for n, t in model.graph.state_dict().items() if n.startswith(there)}
    assert mine
    for part, tensor in mine.items():
        path = f"{edit.stack}.{edit.first}.{part}"
        merged = path.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(tensor, reference.get(merged, reference.get(path)))
    assert report.layers == report.kept + report.students + report.removed + report.projectors
    # As many layers in each block of the interval: the first block's go to the student, the others' are dropped.
    depth = [e for e in EDITS[name] if isinstance(e, DepthEdit)]
    assert report.removed == sum(layers_in(folder, e.stack, i) for e in depth for i in range(e.first + 1, e.last + 1))
    assert report.students == sum(layers_in(folder, e.stack, e.first) for e in depth)
    changed = answer(model, kwargs)
    assert not torch.allclose(changed, output, atol=1e-3)
    model.unload_lora()
    left_out = model.load_lora_adapter(folder, on_students=False)
    assert left_out is not None
    assert (left_out.students, left_out.removed) == (0, report.removed + report.students)
    assert all(torch.equal(before[n], t) for n, t in model.graph.state_dict().items() if n.startswith("students."))
    assert not torch.equal(answer(model, kwargs), changed)
    model.unload_lora()
    assert same(weights(model), before)


def layers_in(folder: Path, stack: str, block: int) -> int:
    start = f"transformer.{stack}.{block}."
    return sum(name.startswith(start) and name.endswith("lora_A.weight") for name in load_file(folder / FILE))


def test_what_projectors_replace_is_dropped_and_counted(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, _, folder = plain
    model.plug(students=model.edits)
    with caplog.at_level(logging.INFO, logger="ppcl_fx.lora"):
        report = model.load_lora_adapter(folder, adapter_name="style")
    # Nine layers a block. Block 4 loses its image feed-forward, blocks 4 and 5 lose their text feed-forward and the
    # attention's text output.
    assert report == LoraReport("style", layers=55, kept=32, students=9, removed=9, projectors=5)
    assert [record.getMessage() for record in caplog.records] == [str(report)]
    assert "\n" not in str(report)
    model.plug(students=[])
    assert model.lora_report() == LoraReport("style", layers=55, kept=55, students=0, removed=0, projectors=0)


def test_narrowed_layers_have_the_lora_too(plain: Any) -> None:
    model, _, folder = plain
    ffn = EDITS["qwen"][1].id
    model.plug(students=[ffn])
    model.load_lora_adapter(folder)
    view = model.graph_module().get_submodule(f"{DUAL}.4.img_mod.1")
    whole = model.graph.get_submodule(f"{DUAL}.4.img_mod.1")
    assert view.weight.shape[0] == whole.weight.shape[0] // 2
    assert torch.equal(view.weight, whole.weight[: view.weight.shape[0]])


def test_several_loras_are_added_in_order_and_weighed(plain: Any, tmp_path: Path) -> None:
    model, kwargs, folder = plain
    second = loras.save(models.tiny_qwen()[0], tmp_path, seed=6, r=3, lora_alpha=2, use_rslora=True)
    before = weights(model)
    model.load_lora_adapter(folder, adapter_name="one")
    model.load_lora_adapter(second, adapter_name="two")
    assert list(model.peft_config) == ["one", "two"]
    assert model.active_adapters() == ["two"]
    model.set_adapters(["one", "two"], [0.5, 1.25])
    teacher = models.tiny_qwen()[0]
    loras.add(teacher, folder, "one")
    loras.add(teacher, second, "two")
    teacher.set_adapters(["one", "two"], [0.5, 1.25])
    teacher.fuse_lora()
    both = answer(model, kwargs)
    assert torch.equal(both, answer(teacher, kwargs))
    model.disable_lora()
    assert same(weights(model), before)
    model.enable_lora()
    assert torch.equal(answer(model, kwargs), both)
    model.delete_adapters("one")
    model.set_adapters("two")
    only = models.tiny_qwen()[0]
    assert torch.equal(answer(model, kwargs), answer(loras.fused(only, second, "two"), kwargs))


def test_the_scale_of_a_call_counts(plain: Any) -> None:
    model, kwargs, folder = plain
    model.load_lora_adapter(folder)
    reference = loras.fused(models.tiny_qwen()[0], folder, scale=0.25)
    scaled = answer(model, {**kwargs, "attention_kwargs": {"scale": 0.25}})
    assert torch.equal(scaled, answer(reference, kwargs))
    assert not torch.equal(answer(model, kwargs), scaled)


def test_fused_loras_stay(plain: Any, tmp_path: Path) -> None:
    model, kwargs, folder = plain
    before = weights(model)
    model.load_lora_adapter(folder)
    with pytest.raises(PpclError, match=r"LoRA 'default_0' is loaded, and saving would .*unload_lora\(\)"):
        model.save(tmp_path / "student")
    with pytest.raises(PpclError, match=r"LoRA 'default_0' is loaded, and training would"):
        model.require_no_lora("training")
    model.fuse_lora()
    expected = answer(model, kwargs)
    model.unload_lora()
    assert model.peft_config == {}
    assert torch.equal(answer(model, kwargs), expected)
    with torch.no_grad():
        for name, tensor in model.graph.state_dict().items():
            tensor.copy_(before[name])


def test_other_layouts_say_the_same(plain: Any, tmp_path: Path) -> None:
    model, kwargs, folder = plain
    tensors = load_file(folder / FILE)
    model.load_lora_adapter(folder)
    expected = answer(model, kwargs)
    peft = {name.replace("transformer.", "base_model.model.", 1): t for name, t in tensors.items()}
    save_file(peft, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}')
    renamed = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in tensors.items()}
    down_up = {name.replace("transformer.", "diffusion_model.", 1): t for name, t in renamed.items()}
    down_up |= {
        name.replace(".lora_down.weight", ".alpha"): torch.tensor(8.0) for name in down_up if "lora_down" in name
    }
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for source, options in ((tmp_path, {}), (down_up, {}), (bare, {"metadata": {"r": 4, "lora_alpha": 8}})):
        model.unload_lora()
        model.load_lora_adapter(source, **options)
        assert torch.equal(answer(model, kwargs), expected)


def test_a_lora_of_another_model_is_refused_in_one_line(plain: Any, tmp_path: Path) -> None:
    model, _, folder = plain
    before = weights(model)
    flux = loras.save(models.tiny_flux()[0], tmp_path / "flux")
    longer = loras.save(models.tiny_qwen(blocks=8)[0], tmp_path / "longer")
    wider = {
        name: torch.cat([t, t], -1) if "lora_A" in name and ".attn.to_q." in name else t
        for name, t in load_file(folder / FILE).items()
    }
    for source, words in (
        (flux, r"\d+ of its \d+ layers do not exist here, the first is '\S+'"),
        (longer, r"18 of its 73 layers do not exist here, the first is 'transformer_blocks\.6\.\S+'"),
        (wider, r"6 of its 55 layers have another shape, .*'transformer_blocks\.0\.attn\.to_q': the LoRA's is 32 x 64, "
                r"the model's 32 x 32"),
    ):
        with pytest.raises(PpclError, match=words) as error:
            model.load_lora_adapter(source)
        assert "\n" not in str(error.value)
    assert same(weights(model), before)
    assert model.peft_config == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer.x.lora_A.weight": torch.zeros(4, 32)}, "x has one of the two factors"),
        ({"transformer.x.hada_w1": torch.zeros(1)}, "'x.hada_w1' is no part of a LoRA"),
        ({"transformer.proj_out.lora_A.weight": torch.zeros(3, 32)}, "the factors of proj_out do not fit each other"),
    ],
)
def test_a_damaged_lora_is_refused(folder_of_qwen: Path, change: Any, words: str) -> None:
    with pytest.raises(PpclError, match=words):
        read_lora(load_file(folder_of_qwen / FILE) | change)


@pytest.fixture
def folder_of_qwen(qwen: Any) -> Path:
    folder: Path = qwen[2]
    return folder


def test_only_safetensors_is_read(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(PpclError, match="only safetensors files are read"):
        read_lora(tmp_path / "lora.bin")
    with pytest.raises(PpclError, match="which of its safetensors files"):
        read_lora(tmp_path)
    with pytest.raises(PpclError, match="no such LoRA"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(PpclError, match="leaves its folder"):
        read_lora(tmp_path, weight_name="../lora.safetensors")
    (tmp_path / FILE).write_bytes(b"cut off")
    with pytest.raises(PpclError, match="truncated or not a safetensors file"):
        read_lora(tmp_path)


def test_unknown_names_and_weights_are_refused(plain: Any) -> None:
    model, _, folder = plain
    model.load_lora_adapter(folder, adapter_name="style")
    with pytest.raises(PpclError, match=r"no LoRA named 'stile' is loaded \(did you mean 'style'\?\)"):
        model.set_adapters("stile")
    with pytest.raises(PpclError, match="loaded already"):
        model.load_lora_adapter(folder, adapter_name="style")
    with pytest.raises(PpclError, match="one weight for each"):
        model.set_adapters(["style"], [1.0, 2.0])
    with pytest.raises(PpclError, match="give one number"):
        model.set_adapters(["style"], [{"mid": 1.0}])
    model.load_lora_adapter(folder, adapter_name="style", hotswap=True)
    assert list(model.peft_config) == ["style"]


def test_weights_changed_behind_a_lora_are_noticed(plain: Any) -> None:
    model, _, folder = plain
    before = weights(model)
    model.load_lora_adapter(folder)
    weight = model.graph.get_parameter(f"{DUAL}.0.attn.to_q.weight")
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(PpclError, match=r"0\.attn\.to_q\.weight was changed while a LoRA was loaded"):
        model.unload_lora()
    # Only this test may do so: the model is shared.
    model._adapters._written.clear()
    model.unload_lora()
    assert same(weights(model), before)


def test_another_dtype_takes_the_lora_along(plain: Any) -> None:
    model, kwargs, folder = plain
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    before = weights(model)
    model.load_lora_adapter(folder)
    model.to(torch.bfloat16)
    reference = loras.fused(models.tiny_qwen()[0].to(torch.bfloat16), folder)
    assert torch.equal(answer(model, half), answer(reference, half))
    model.unload_lora()
    assert same(weights(model), {name: t.to(torch.bfloat16) for name, t in before.items()})
    model.to(torch.float32)
    with torch.no_grad():
        for name, tensor in model.graph.state_dict().items():
            tensor.copy_(before[name])
