"""Reading a LoRA: the key layouts of diffusers and PEFT, safetensors only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppcl_fx.errors import PpclError
from ppcl_fx.files import inside, read_json, read_safetensors
from ppcl_fx.reading import parse_json

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names that diffusers and PEFT give the file, in the order in which a folder is searched."""
CONFIG = "adapter_config.json"
"""PEFT's settings beside the weights."""
METADATA = "lora_adapter_metadata"
"""Where diffusers puts the same settings in the header of the file."""
PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.")
"""What may stand before a module's path; the first is diffusers', the second PEFT's."""
PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(?:\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)"
)
DOWN = ("lora_A", "lora_down", "lora.down")


class Settings(BaseModel):
    """What PEFT's `LoraConfig` says about strengths; the other fields are about training.

    Attributes:
        r: rank of the layers that no pattern names.
        lora_alpha: their strength: a layer's change is ``alpha / rank * B A``.
        rank_pattern: end of a module path (a regular expression) -> rank.
        alpha_pattern: end of a module path (a regular expression) -> alpha.
        use_rslora: divide by the root of the rank instead.
    """

    model_config = ConfigDict(extra="ignore")

    peft_type: str = "LORA"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False

    def alpha(self, module: str) -> float:
        """Return the alpha of a module, as PEFT matches its patterns: by the end of the path."""
        for pattern, value in self.alpha_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module):
                return value
        return self.lora_alpha


@dataclass(frozen=True)
class Layer:
    """The change of one linear layer: ``strength * alpha / rank * up @ down``.

    Attributes:
        down: ``A``, ``[rank, in]``.
        up: ``B``, ``[out, rank]``.
        bias: change of the bias, ``[out]``, if the LoRA has one.
        alpha: numerator of the scaling.
        rooted: divide by the root of the rank (rank-stabilised LoRA).
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    alpha: float
    rooted: bool = False

    @property
    def rank(self) -> int:
        """The inner width."""
        return int(self.down.shape[0])

    def scaling(self, strength: float) -> float:
        """Return the factor of ``up @ down``, rounded as PEFT rounds it."""
        return strength * self.alpha / (math.sqrt(self.rank) if self.rooted else self.rank)

    def delta(self, like: torch.Tensor, strength: float) -> torch.Tensor:
        """Return what is added to the weight `like`, by PEFT's own arithmetic, in its dtype and on its device.

        The factors are rounded to the weight's dtype first, as they are when diffusers puts them beside the weight; on
        a CPU the product of 16-bit factors is taken in float32.
        """
        down, up = (t.to(like.device, like.dtype) for t in (self.down, self.up))
        if like.device.type == "cpu" and like.dtype in (torch.float16, torch.bfloat16):
            return (up.float() @ down.float() * self.scaling(strength)).to(like.dtype)
        return up @ down * self.scaling(strength)


def read_lora(
    source: str | Path | Mapping[str, torch.Tensor],
    prefix: str | None = "transformer",
    weight_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Layer]:
    """Read a LoRA for a transformer.

    Args:
        source: a safetensors file, a folder with one, or its tensors by name.
        prefix: the component whose tensors are wanted, where names begin with one; others are left out.
        weight_name: which file of the folder.
        metadata: `LoraConfig` settings, with or without the prefix; by default those of the file.
        alphas: alpha of each layer, as diffusers' loaders give them beside the tensors.

    Returns:
        Module path in the transformer -> its change. Empty where the file holds nothing for this component.

    Raises:
        PpclError: the file is missing, damaged or of another kind, or a tensor is no part of a LoRA.
    """
    where, tensors, found = _open(source, weight_name)
    tensors, start = _component(tensors, prefix)
    settings = _settings(where, metadata if metadata is not None else found, prefix)
    given = {_bare(name, start): float(value) for name, value in (alphas or {}).items()}
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and tensor.numel() == 1:
            given[name.removesuffix(".alpha")] = float(tensor)
            continue
        match = PART.fullmatch(name)
        if match is None:
            raise PpclError(
                f"{where}: {name!r} is no part of a LoRA that is known here; convert it to diffusers' layout "
                "(MODULE.lora_A.weight, MODULE.lora_B.weight)"
            )
        down = match["part"] in DOWN
        home = (downs if down else ups) if match["kind"] == "weight" else biases
        if match["kind"] == "bias" and down:
            raise PpclError(f"{where}: {name!r} is a bias of the first factor, which no LoRA here has; save it again")
        home[match["module"]] = tensor
    return _layers(where, downs, ups, biases, settings, given)


def _layers(
    where: str,
    downs: Mapping[str, torch.Tensor],
    ups: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor],
    settings: Settings | None,
    alphas: Mapping[str, float],
) -> dict[str, Layer]:
    lonely = sorted((downs.keys() ^ ups.keys()) | (biases.keys() - ups.keys()))
    if lonely:
        raise PpclError(f"{where}: {lonely[0]} has one of the two factors of a LoRA only; save it again")
    layers: dict[str, Layer] = {}
    for module in sorted(downs):
        down, up = downs[module], ups[module]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.is_floating_point():
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise PpclError(f"{where}: the factors of {module} do not fit each other ({shapes}); save it again")
        alpha = alphas.get(module, settings.alpha(module) if settings is not None else float(down.shape[0]))
        rooted = settings is not None and settings.use_rslora
        layers[module] = Layer(down, up, biases.get(module), alpha, rooted)
    return layers


def _open(
    source: str | Path | Mapping[str, torch.Tensor], weight_name: str | None
) -> tuple[str, dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return how to name the source in a message, its tensors, and the settings that came with it."""
    if isinstance(source, Mapping):
        return "the LoRA", dict(source), None
    path = Path(source)
    if not path.exists():
        raise PpclError(f"{path}: no such LoRA; give a safetensors file or a folder (the hub is the pipeline's matter)")
    config = None
    if path.is_dir():
        path = _file_in(path, weight_name)
        if (path.parent / CONFIG).is_file():
            config = read_json(path.parent / CONFIG, _Any).model_dump()
    if path.suffix != ".safetensors":
        raise PpclError(f"{path}: only safetensors files are read, other kinds may hold code; convert it first")
    tensors = read_safetensors(path)
    return str(path), tensors, config or _header(path)


class _Any(BaseModel):
    model_config = ConfigDict(extra="allow")


def _file_in(folder: Path, name: str | None) -> Path:
    if name is not None:
        return inside(folder, name)
    there = sorted(p.name for p in folder.glob("*.safetensors"))
    for name in FILES:
        if name in there:
            return inside(folder, name)
    if len(there) != 1:
        have = ", ".join(there) or "none"
        raise PpclError(f"{folder}: which of its safetensors files is the LoRA ({have})? give the file itself")
    return inside(folder, there[0])


def _header(path: Path) -> dict[str, Any] | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return None
    try:
        values = parse_json(text.encode())
    except ValueError as error:
        raise PpclError(f"{path}: its {METADATA} is no JSON ({error}); save the LoRA again") from None
    return values if isinstance(values, dict) else None


def _settings(where: str, values: Mapping[str, Any] | None, prefix: str | None) -> Settings | None:
    if not values:
        return None
    start = f"{prefix}." if prefix else ""
    mine = {name.removeprefix(start): v for name, v in values.items() if name.startswith(start)} or dict(values)
    try:
        settings = Settings.model_validate(mine)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise PpclError(f"{where}: its setting {fault['loc'][0]!r}: {fault['msg'].lower()}; save it again") from None
    odd = {"use_dora": settings.use_dora, "fan_in_fan_out": settings.fan_in_fan_out}
    wrong = [name for name, on in odd.items() if on] + [settings.peft_type] * (settings.peft_type != "LORA")
    if wrong:
        raise PpclError(f"{where}: {wrong[0]} is not supported, only plain LoRA is; merge it into the teacher instead")
    return settings


def _component(tensors: dict[str, torch.Tensor], prefix: str | None) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of the wanted component with their prefix cut off, and that prefix."""
    starts = dict.fromkeys(([f"{prefix}."] if prefix else []) + list(PREFIXES))
    for start in starts:
        mine = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        if mine:
            return mine, start
    others = {name.split(".")[0] for name in tensors}
    # Only other components: a LoRA of a text encoder, for example.
    if prefix and others and all(other.startswith("text_encoder") for other in others):
        return {}, ""
    return tensors, ""


def _bare(name: str, start: str) -> str:
    return name.removeprefix(start).split(".lora_")[0].removesuffix(".alpha")


def misfits(layers: Mapping[str, Layer], shapes: Mapping[str, tuple[int, int]], modules: Iterable[str]) -> str:
    """Say in words why a LoRA is not for a model, or return an empty string.

    Args:
        layers: the LoRA.
        shapes: the model's linear layers: path -> (out, in).
        modules: the paths of all modules of the model.
    """
    missing = [path for path in layers if path not in shapes]
    if missing:
        first = missing[0]
        kind = ", which is no linear layer here" if first in set(modules) else ""
        return f"{len(missing)} of its {len(layers)} layers do not exist here, the first is {first!r}{kind}"
    wrong = [
        path
        for path, layer in layers.items()
        if (layer.up.shape[0], layer.down.shape[1]) != shapes[path]
        or (layer.bias is not None and layer.bias.shape[0] != shapes[path][0])
    ]
    if not wrong:
        return ""
    layer, (rows, columns) = layers[wrong[0]], shapes[wrong[0]]
    return (
        f"{len(wrong)} of its {len(layers)} layers have another shape, the first is {wrong[0]!r}: the LoRA's is "
        f"{layer.up.shape[0]} x {layer.down.shape[1]}, the model's {rows} x {columns}"
    )
