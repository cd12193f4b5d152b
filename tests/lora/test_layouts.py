"""The layouts of a LoRA against diffusers: names as trainers write them, through its loaders and converters, fused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin, QwenImageLoraLoaderMixin, SD3LoraLoaderMixin

from ppcl_fx.errors import PpclError
from ppcl_fx.lora.keys import loader_of
from tests import models
from tests.lora.loras import Tensors, answer, check, factors, write

pytestmark = pytest.mark.slow

DUAL = "transformer_blocks"


def test_alphas_beside_the_tensors_count_as_diffusers_counts_them(model_of: Any, tmp_path: Path) -> None:
    tensors = factors("flux")
    paths = {name.split(".lora_")[0] for name in tensors}
    alphas = {f"{path}.alpha": torch.tensor(float(len(path) % 5 + 1)) for path in sorted(paths) if "attn" in path}
    check("flux", model_of("flux"), write(tmp_path, {**tensors, **alphas}))


@pytest.mark.parametrize("name", ["qwen", "sd3"])
def test_each_layer_has_its_own_alpha(name: str, model_of: Any, tmp_path: Path) -> None:
    # By the sum: diffusers' loaders refuse these alphas, or leave them out.
    model, tensors = model_of(name), factors(name, rank=lambda path: 2 + len(path) % 3)
    paths = sorted({key.split(".lora_")[0] for key in tensors})
    alphas = {path: float(len(path) % 5 + 1) for path in paths}
    before = {key: tensor.clone() for key, tensor in model.graph.state_dict().items()}
    model.load_lora_adapter({**tensors, **{f"{path}.alpha": torch.tensor(alpha) for path, alpha in alphas.items()}})
    after = model.graph.state_dict()
    for path in paths:
        down, up = (tensors[f"{path}.lora_{part}.weight"] for part in "AB")
        key = f"{path.removeprefix('transformer.')}.weight"
        torch.testing.assert_close(after[key], before[key] + up @ down * (alphas[path] / down.shape[0]))


def flat(tensors: Tensors, alpha: float | None = 2.0) -> Tensors:
    """Names as kohya's trainers write them."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        path, _, rest = name.partition(".lora_")
        start = "lora_unet_" + path.replace(".", "_")
        made[f"{start}.lora_{rest}"] = tensor
        if alpha is not None:
            made[f"{start}.alpha"] = torch.tensor(alpha)
    return made


def test_kohya_s_names_for_qwen_image(model_of: Any, tmp_path: Path) -> None:
    in_blocks = factors("qwen", wanted=lambda path: path.startswith(DUAL), words=("lora_down", "lora_up"), prefix="")
    check("qwen", model_of("qwen"), write(tmp_path, flat(in_blocks)))


def test_the_names_of_qwen_image_s_lightning(model_of: Any, tmp_path: Path) -> None:
    tensors = factors("qwen", wanted=lambda path: path.startswith(DUAL), words=("lora_down", "lora_up"), prefix="")
    paths = {name.split(".lora_")[0] for name in tensors}
    tensors |= {f"{path}.alpha": torch.tensor(3.0) for path in paths}
    check("qwen", model_of("qwen"), write(tmp_path, tensors))


def kohya_flux() -> Tensors:
    """What kohya's FLUX trainer writes for the double blocks, q, k and v in one."""
    generator = torch.Generator().manual_seed(4)
    width, tensors = models.WIDTH, {}
    for block in range(models.FLUX_DUAL_BLOCKS):
        for part, (rows, columns) in {
            "img_attn_qkv": (3 * width, width),
            "img_attn_proj": (width, width),
            "txt_attn_qkv": (3 * width, width),
            "img_mlp_0": (4 * width, width),
            "img_mod_lin": (6 * width, width),
        }.items():
            start = f"lora_unet_double_blocks_{block}_{part}"
            tensors[f"{start}.lora_down.weight"] = 0.1 * torch.randn(4, columns, generator=generator)
            tensors[f"{start}.lora_up.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
            tensors[f"{start}.alpha"] = torch.tensor(2.0)
    return tensors


def test_kohya_s_names_for_flux(model_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("flux")
    check("flux", model, write(tmp_path, kohya_flux()))
    assert len(model._adapters.loaded["default_0"].layers) == models.FLUX_DUAL_BLOCKS * 9
    # diffusers gives this one no component's name, and leaves it out.
    generator = torch.Generator().manual_seed(5)
    more = {
        "lora_unet_img_in.lora_down.weight": torch.randn(4, 16, generator=generator),
        "lora_unet_img_in.lora_up.weight": torch.randn(models.WIDTH, 4, generator=generator),
    }
    expected = answer(model, "flux")
    model.unload_lora()
    with caplog.at_level(logging.WARNING, logger="ppcl_fx.lora"):
        model.load_lora_adapter({**kohya_flux(), **more})
    assert "left out, as their names are not the transformer's: x_embedder" in caplog.text
    assert torch.equal(answer(model, "flux"), expected)


def test_xlabs_names_for_flux(model_of: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    width, tensors = models.WIDTH, {}
    for block in range(models.FLUX_DUAL_BLOCKS):
        for index, part in ((1, "qkv"), (2, "qkv"), (1, "proj"), (2, "proj")):
            start = f"double_blocks.{block}.processor.{part}_lora{index}"
            tensors[f"{start}.down.weight"] = 0.1 * torch.randn(4, width, generator=generator)
            rows = 3 * width if part == "qkv" else width
            tensors[f"{start}.up.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    check("flux", model_of("flux"), write(tmp_path, tensors))


def test_a_control_lora_is_refused_for_what_it_replaces(model_of: Any) -> None:
    width = models.WIDTH
    tensors = {
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(models.HEAD_DIM),
        "double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(models.HEAD_DIM),
        "double_blocks.0.img_attn.proj.lora_A.weight": torch.zeros(4, width),
        "double_blocks.0.img_attn.proj.lora_B.weight": torch.zeros(width, 4),
    }
    with pytest.raises(PpclError, match=r"is no part of a LoRA that is known here \(FluxLoraLoaderMixin of diffusers"):
        model_of("flux").load_lora_adapter(tensors)


def test_the_old_names_of_diffusers(model_of: Any, tmp_path: Path) -> None:
    tensors = factors("sd3", words=("lora.down", "lora.up"))
    check("sd3", model_of("sd3"), write(tmp_path, tensors))


def test_other_prefixes_mean_the_same(model_of: Any) -> None:
    model = model_of("flux")
    model.load_lora_adapter(factors("flux"))
    expected = answer(model, "flux")
    for prefix in ("", "diffusion_model.", "base_model.model."):
        model.unload_lora()
        model.load_lora_adapter(factors("flux", prefix=prefix))
        assert torch.equal(answer(model, "flux"), expected)


def test_what_is_left_out_is_said(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tensors = model_of("qwen"), factors("qwen", wanted=lambda path: path == "proj_out")
    more = {"text_encoder.x.lora_A.weight": torch.zeros(2, 2), "text_encoder.x.lora_B.weight": torch.zeros(2, 2)}
    with caplog.at_level(logging.WARNING, logger="ppcl_fx.lora"):
        model.load_lora_adapter({**tensors, **more})
        model.load_lora_adapter({**tensors, "transformer.nowhere.alpha": torch.tensor(3.0)})
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "the LoRA: left out, as their names are not the transformer's: text_encoder"
    assert said[1] == "the LoRA: 1 of its alphas are of no layer of it, the first of 'nowhere'"
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys did not match any targeted module .*\['nothing'\]"):
        model.load_lora_adapter(tensors, metadata={"r": 4, "lora_alpha": 8, "alpha_pattern": {"nothing": 3}})


def test_a_pipeline_s_other_components_need_no_word(model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Pipeline:
        _lora_loadable_modules = ("transformer", "text_encoder")

    tensors = {**factors("sd3"), "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}
    with caplog.at_level(logging.WARNING, logger="ppcl_fx.lora"):
        model_of("sd3").load_lora_adapter(tensors, _pipeline=Pipeline())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer.proj_out.dora_scale": torch.ones(16)}, r"a DoRA in a layout that diffusers does not read"),
        ({"transformer.proj_out.diff": torch.ones(1)}, r"'proj_out\.diff' is no part of a LoRA that is known here"),
        ({"transformer.proj_out.hada_w1_a": torch.ones(1)}, r"'proj_out\.hada_w1_a' is no part of a LoRA"),
        ({"transformer.norm_out.norm.lora_A.weight": torch.zeros(4, 1),
          "transformer.norm_out.norm.lora_B.weight": torch.zeros(1, 4)},
         r"the first is 'norm_out\.norm', which is no layer that a LoRA changes"),
        ({"transformer.img_in.lokr_w1": torch.ones(4, 4), "transformer.img_in.lokr_w2": torch.ones(8, 4)},
         r"leave no place for proj_out\.lora_A\.weight"),
        ({"transformer.proj_out.lora_down.weight": torch.zeros(4, 32)}, r"'proj_out\.lora_down\.weight' is no part"),
        ({"transformer.proj_out.lora_A.weight": torch.full((4, 32), float("nan"))}, r"lora_A\.weight is not finite"),
        # diffusers' converter would never end on it.
        ({"transformer.proj_out.alpha": torch.tensor(-3.0)}, r"alpha is -3\.0; an alpha is a finite number, 0 or more"),
    ],
)  # fmt: skip
def test_what_nobody_reads_is_refused_by_its_reason(model_of: Any, change: Tensors, words: str) -> None:
    model, tensors = model_of("qwen"), factors("qwen", wanted=lambda path: path == "proj_out")
    with pytest.raises(PpclError, match=words) as error:
        model.load_lora_adapter({**tensors, **change})
    assert "\n" not in str(error.value)
    assert model.peft_config == {}


def test_alphas_and_settings_together_are_refused(model_of: Any) -> None:
    tensors = factors("flux", wanted=lambda path: path == "proj_out")
    alphas = {"transformer.proj_out.alpha": torch.tensor(8.0)}
    with pytest.raises(PpclError, match="alphas and PEFT's settings, which may differ"):
        model_of("flux").load_lora_adapter(tensors, metadata={"r": 4}, network_alphas=alphas)


def test_kohya_s_names_of_another_model_name_the_converter(model_of: Any) -> None:
    tensors = flat(factors("sd3", words=("lora_down", "lora_up"), prefix=""))
    with pytest.raises(PpclError, match=r"do not exist here.*SD3LoraLoaderMixin of diffusers does not convert it"):
        model_of("sd3").load_lora_adapter(tensors)


def test_a_loader_is_found_for_every_transformer_whose_pipelines_have_one() -> None:
    assert loader_of("FluxTransformer2DModel") is FluxLoraLoaderMixin
    assert loader_of("QwenImageTransformer2DModel") is QwenImageLoraLoaderMixin
    assert loader_of("SD3Transformer2DModel") is SD3LoraLoaderMixin
    assert loader_of("WanTransformer3DModel").__name__ == "WanLoraLoaderMixin"
    assert loader_of("NoTransformer") is None
