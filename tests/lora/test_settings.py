"""The settings of a LoRA against diffusers: ranks and alphas by PEFT's matching, its variants merged by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from ppcl_fx.errors import PpclError
from tests.lora import loras
from tests.lora.loras import BUILD, answer, by_diffusers, check, factors, made, write

pytestmark = pytest.mark.slow

DUAL = "transformer_blocks"


def test_a_caret_means_the_start_of_a_path(any_model: Any, tmp_path: Path) -> None:
    name, model = any_model
    tensors = factors(name, rank=lambda path: 8 if path == "proj_out" else 4)
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.rank_pattern": {"^proj_out": 8},
        "transformer.alpha_pattern": {"^proj_out": 32},
        "transformer.target_modules": ["proj_out"],
    }
    check(name, model, write(tmp_path, tensors, settings))
    layers = model._adapters.loaded["default_0"].layers
    scaling = {path: layer.tuner.scaling[layer.name] for path, layer in layers.items()}
    assert {path: factor for path, factor in scaling.items() if factor != 1} == {"proj_out": 4.0}


def test_patterns_are_matched_by_peft(any_model: Any, tmp_path: Path) -> None:
    name, model = any_model
    first = r"^transformer_blocks\.[01]\.attn\.to_q"
    patterns = {"rank_pattern": {first: 2, "to_k": 3}, "alpha_pattern": {first: 7, r"(to_v|to_q)": 5}}
    check(name, model, made(name, tmp_path, **patterns))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
def test_what_peft_can_merge_is_merged_as_it_does(any_model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    name, model = any_model
    check(name, model, made(name, tmp_path, **options))


def test_a_bias_is_changed_where_the_file_has_one(any_model: Any, tmp_path: Path) -> None:
    name, model = any_model
    tensors = factors(name, wanted=lambda path: path.endswith(("attn.to_q", "proj_out")))
    biases = {
        key.replace(".weight", ".bias"): tensor[:, 0].clone()
        for key, tensor in tensors.items()
        if key.endswith("to_q.lora_B.weight")
    }
    check(name, model, write(tmp_path, {**tensors, **biases}))
    layers = model._adapters.loaded["default_0"].layers
    assert layers[f"{DUAL}.0.attn.to_q"].changes == ("weight", "bias")
    assert layers["proj_out"].changes == ("weight",)


def test_several_of_different_kinds_are_merged_in_order(any_model: Any, tmp_path: Path) -> None:
    # The magnitudes of DoRA depend on the weight without the adapters before it.
    name, model = any_model
    paths = [made(name, tmp_path / str(i), seed=i, use_dora=i != 1, r=3 + i) for i in range(3)]
    for index, path in enumerate(paths):
        model.load_lora_adapter(path, adapter_name=f"lora{index}")
    model.set_adapters(["lora0", "lora1", "lora2"])
    assert torch.equal(answer(model, name), answer(by_diffusers(name, *paths), name))


def test_lokr_is_merged_by_peft(model_of: Any, tmp_path: Path) -> None:
    model, teacher = model_of("qwen"), BUILD["qwen"]()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        teacher.add_adapter(LoKrConfig(r=2, alpha=4, target_modules=["to_q", "to_k"], init_weights=False))
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(teacher).items()}
    teacher.fuse_lora()
    report = model.load_lora_adapter(
        write(tmp_path, tensors, {"transformer.peft_type": "LOKR", "transformer.r": 2, "transformer.alpha": 4})
    )
    assert report is not None and report.layers == 12
    assert torch.equal(answer(model, "qwen"), answer(teacher, "qwen"))


def test_a_convolution_is_changed_too(model_of: Any, tmp_path: Path) -> None:
    # SD3's patches are embedded by one.
    model = model_of("sd3")
    check("sd3", model, made("sd3", tmp_path, target_modules=["pos_embed.proj", "to_q"]))
    assert "pos_embed.proj" in model._adapters.loaded["default_0"].layers


def test_a_dora_on_a_student_has_the_student_s_own_norms(model_of: Any, tmp_path: Path) -> None:
    model = model_of("qwen")
    path = f"students.{DUAL}_0_1.attn.to_q"
    student = model.graph.get_submodule(path)
    before = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.mul_(1.5)
    model.load_lora_adapter(made("qwen", tmp_path, use_dora=True))
    plain = nn.Sequential(nn.Linear(*reversed(before.shape)))
    with torch.no_grad():
        plain[0].weight.copy_(1.5 * before)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True), plain)
    start = f"transformer.{DUAL}.0.attn.to_q."
    loaded = load_file(tmp_path / loras.FILE)
    own = {f"0.{k.removeprefix(start)}": v for k, v in loaded.items() if k.startswith(start)}
    set_peft_model_state_dict(plain, own)
    plain[0].merge()  # type: ignore[operator]
    assert torch.equal(student.weight, plain[0].base_layer.weight)  # type: ignore[union-attr]
    model.unload_lora()
    assert torch.equal(student.weight, 1.5 * before)
    with torch.no_grad():
        student.weight.copy_(before)


def test_settings_of_a_text_encoder_alone_say_nothing_of_the_transformer(any_model: Any, tmp_path: Path) -> None:
    name, model = any_model
    tensors = factors(name)
    settings = {"text_encoder.r": 16, "text_encoder.lora_alpha": 32}
    path = write(tmp_path, tensors, settings)
    model.load_lora_adapter(path)
    got = answer(model, name)
    assert torch.equal(got, answer(by_diffusers(name, write(tmp_path, tensors)), name))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, r"proj_out has rank 8 by its settings, 4 by its tensors"),
        ({"r": 4, "alpha_pattern": {"(": 3}}, r"setting 'alpha_pattern\S*': .*'\(' is no regular expression"),
        ({"r": 4, "lora_alpha": "much"}, r"setting 'lora_alpha': .*valid number"),
        ({"r": 4, "use_dora": True}, r"proj_out lacks lora_magnitude_vector"),
        ({"r": 4, "lora_alpha": 1e308}, r"PEFT cannot merge the LoRA \(NaNs detected"),
        ({"r": 0}, r"setting 'r': .*greater than 0"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4', which changes the teacher's weights too"),
        ({"r": 4, "alora_invocation_tokens": [1]}, r"'alora_invocation_tokens' is not supported: it cannot be fused"),
        ({"peft_type": "LOHA"}, r"LOHA is not supported, only LoRA and LoKr are"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(model_of: Any, settings: dict[str, Any], words: str) -> None:
    model = model_of("qwen")
    tensors = factors("qwen", wanted=lambda path: path == "proj_out")
    with pytest.raises(PpclError, match=words) as error:
        model.load_lora_adapter(tensors, metadata={f"transformer.{k}": v for k, v in settings.items()})
    assert "\n" not in str(error.value)
    assert model.peft_config == {}


def test_settings_about_training_are_not_handed_on(model_of: Any) -> None:
    # PEFT would import what these name, or read it.
    model, tensors = model_of("qwen"), factors("qwen", wanted=lambda path: path == "proj_out")
    others = {"megatron_config": {"a": 1}, "megatron_core": "antigravity", "lora_dropout": 0.5, "task_type": "X"}
    model.load_lora_adapter(tensors, metadata={"r": 4, "lora_alpha": 2})
    expected = answer(model, "qwen")
    model.unload_lora()
    model.load_lora_adapter(tensors, metadata={"r": 4, "lora_alpha": 2, **others})
    assert torch.equal(answer(model, "qwen"), expected)


def test_a_weight_that_is_too_large_changes_nothing(model_of: Any) -> None:
    model = model_of("qwen")
    model.load_lora_adapter(factors("qwen"), adapter_name="style")
    before = {name: tensor.clone() for name, tensor in model.graph.state_dict().items()}
    with pytest.raises(PpclError, match="PEFT cannot merge"):
        model.set_adapters("style", 1e308)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.graph.state_dict().items())
    model.set_adapters("style", 0.0)
    assert torch.equal(answer(model, "qwen"), answer(BUILD["qwen"]()[0], "qwen"))
