"""LoRAs made with PEFT on the small models, written and read as a user would."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import FluxLoraLoaderMixin, QwenImageLoraLoaderMixin, SD3LoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from ppcl_fx.model.pluggable import PluggableModel
from tests import models

FILE = "pytorch_lora_weights.safetensors"
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out",
    "img_mod.1", "norm1.linear", "norm.linear",
    "img_mlp.net.2", "txt_mlp.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "proj_mlp",
    "proj_out",
]  # fmt: skip
"""Ends of module paths: parts of every kind of block of the three small models, and the last layer."""
BUILD: dict[str, Any] = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
LOADERS: dict[str, Any] = {
    "qwen": QwenImageLoraLoaderMixin,
    "flux": FluxLoraLoaderMixin,
    "sd3": SD3LoraLoaderMixin,
}
Tensors = dict[str, torch.Tensor]


def make(teacher: Any, seed: int = 5, **options: Any) -> Any:
    """Give a transformer a random LoRA (rank 4, alpha 8) with PEFT, and return the transformer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False} | options
        teacher.add_adapter(LoraConfig(**given))
    return teacher


def save(teacher: Any, folder: Path, **options: Any) -> Path:
    """Make a LoRA on a teacher (which keeps it) and write it in diffusers' layout, its settings in the header."""
    make(teacher, **options)
    settings = teacher.peft_config["default"].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items() if _is_plain(v)}
    # The same file for every transformer: a pipeline's class only chooses the prefix.
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(teacher),
        transformer_lora_adapter_metadata=plain,
    )
    return folder


def add(teacher: Any, folder: Path, name: str) -> None:
    """Load the LoRA in a folder beside a teacher's weights, by diffusers and PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT warns of every second LoRA
        teacher.load_lora_adapter(folder, weight_name=FILE, use_safetensors=True, adapter_name=name)


def fused(teacher: Any, folder: Path, name: str = "style", scale: float = 1.0) -> nn.Module:
    """Return a teacher with the LoRA in a folder fused into its weights by diffusers and PEFT."""
    add(teacher, folder, name)
    teacher.fuse_lora(lora_scale=scale)
    made: nn.Module = teacher
    return made


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, dict, list, set)) and not hasattr(value, "value")


def factors(
    name: str,
    rank: Callable[[str], int] = lambda path: 4,
    wanted: Callable[[str], bool] = lambda path: True,
    words: tuple[str, str] = ("lora_A", "lora_B"),
    prefix: str = "transformer.",
) -> Tensors:
    """Random factors for the linear layers of a small model."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for path, module in BUILD[name]()[0].named_modules():
        if isinstance(module, nn.Linear) and wanted(path):
            for word, shape in zip(
                words, ((rank(path), module.in_features), (module.out_features, rank(path))), strict=True
            ):
                tensors[f"{prefix}{path}.{word}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    return tensors


def write(folder: Path, tensors: Tensors, settings: dict[str, Any] | None = None) -> Path:
    path = folder / FILE
    head = {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **head})
    return path


def by_diffusers(name: str, *paths: Path) -> Any:
    """The teacher with LoRAs fused, read as `load_lora_weights` of its pipeline reads them."""
    teacher, loader = BUILD[name]()[0], LOADERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, path in enumerate(paths):
            if name == "flux":
                state, alphas, metadata = loader.lora_state_dict(
                    str(path), return_alphas=True, return_lora_metadata=True
                )
                more = {"network_alphas": alphas}
            else:
                state, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True)
                more = {}
            loader.load_lora_into_transformer(
                state, transformer=teacher, adapter_name=f"lora{index}", metadata=metadata, **more
            )
    teacher.set_adapters([f"lora{index}" for index in range(len(paths))])
    teacher.fuse_lora()
    return teacher


def answer(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**BUILD[name]()[1], "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


def check(name: str, model: PluggableModel, path: Path) -> None:
    """A loaded file gives the answer of diffusers' fused teacher to the bit, which is not the bare teacher's."""
    without = answer(model, name)
    model.load_lora_adapter(path)
    expected = answer(by_diffusers(name, path), name)
    assert torch.equal(answer(model, name), expected)
    assert not torch.allclose(expected, without, atol=1e-3)


def made(name: str, folder: Path, **options: Any) -> Path:
    """A LoRA made by PEFT with these options, in diffusers' layout."""
    folder.mkdir(exist_ok=True)
    return save(BUILD[name]()[0], folder, **options) / FILE
