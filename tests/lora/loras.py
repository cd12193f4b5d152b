"""LoRAs made with PEFT on the small models, written and read as a user would."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import QwenImageLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

FILE = "pytorch_lora_weights.safetensors"
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out",
    "img_mod.1", "norm1.linear", "norm.linear",
    "img_mlp.net.2", "txt_mlp.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "proj_mlp",
    "proj_out",
]  # fmt: skip
"""Ends of module paths: parts of every kind of block of the three small models, and the last layer."""


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
