"""Reading a LoRA, safetensors only: its file, its names, which of its tensors are for the transformer.

Other trainers' key layouts are read by diffusers' own converters, found through the pipelines of the model's class.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import inside, read_json, read_safetensors, safetensors_metadata
from ppcl_fx.io.reading import parse_json
from ppcl_fx.lora.settings import of_layers, settings

log = logging.getLogger("ppcl_fx.lora")

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names that diffusers and PEFT give the file, in the order in which a folder is searched."""
CONFIG = "adapter_config.json"
"""PEFT's settings beside the weights."""
METADATA = "lora_adapter_metadata"
"""Where diffusers puts the same settings in the header of the file."""
PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.")
"""What may stand before a module's path; the first is diffusers', the second PEFT's."""
FACTORS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_down": "lora_A", "lora_up": "lora_B"}
"""What the two factors are called, and what PEFT calls them."""
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""PEFT's words for the factors of LoKr."""
PART = re.compile(
    rf"(?P<module>.+?)\.(?P<part>{'|'.join(FACTORS)}|lora_magnitude_vector|{'|'.join(LOKR)})"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<kind>\.weight|\.bias)?"
)
KINDS = {"lora_A": (".weight",), "lora_B": (".weight", ".bias")}
"""What stands behind a factor; behind other parts nothing has to."""
DROPPED = ".dora_scale"
"""How others than PEFT write DoRA's magnitudes; diffusers leaves them out, and the rest means something else."""
LAYOUT = "convert it to diffusers' layout (MODULE.lora_A.weight, MODULE.lora_B.weight)"


FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers and PEFT raise, without a plan, where names, shapes or settings are not what they expect."""


def line(error: Exception) -> str:
    """Return what a library's error says, in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]}..."


class Model(NamedTuple):
    """The model that a LoRA is read for: the paths of its modules, and the name of the transformer's class."""

    modules: Collection[str]
    kind: str


@dataclass(frozen=True)
class Lora:
    """A LoRA for the transformer.

    Attributes:
        where: what to name in a message.
        tensors: by PEFT's names, from the module's path on.
        modules: the paths of the modules that it changes.
        settings: as PEFT's class takes them; ``None`` where the tensors say all.
        alphas: alpha by the tensors' own names, as diffusers' loaders give them; empty beside settings.
        note: why its names were not converted, for a message that they are not the model's.
    """

    where: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    alphas: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class _Names:
    """The tensors of one component, sorted by what their names say."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, None] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    renamed: bool = False

    def fit(self, modules: Collection[str]) -> bool:
        """Whether every name is understood and is of a module that is there."""
        return not self.unknown and all(module in modules for module in self.modules)


def read_lora(
    source: str | Path | Mapping[str, torch.Tensor],
    prefix: str | None = "transformer",
    weight_name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    alphas: Mapping[str, Any] | None = None,
    model: Model | None = None,
    elsewhere: Collection[str] = (),
) -> Lora:
    """Read a LoRA for a transformer.

    Args:
        source: a safetensors file, a folder with one (the one called `weight_name`), or its tensors by name.
        prefix: the component whose tensors are wanted, where names begin with one; others are left out.
        metadata: PEFT's settings, with or without the prefix; by default those of the file.
        alphas: alpha of each layer, as diffusers' loaders give them beside the tensors.
        model: what it is for: names that are not its own go through diffusers' converters.
        elsewhere: components that somebody else loads, so that leaving them out needs no word.

    Returns:
        The LoRA; without modules where the file holds nothing for this component.

    Raises:
        PpclError: the file is missing, damaged or of another kind, or a tensor is no part of a LoRA.
    """
    where, tensors, found = _open(source, weight_name)
    dropped = [name for name in tensors if name.endswith(DROPPED)]
    if dropped:
        raise PpclError(f"{where}: it is a DoRA in a layout that diffusers does not read ({dropped[0]!r}); {LAYOUT}")
    _check_values(where, tensors, alphas or {})
    names, note = _sorted(tensors, prefix), ""
    if model is not None and (names.renamed or not names.fit(model.modules)):
        made, beside, note = converted(model.kind, tensors)
        theirs = _sorted(made, prefix)
        if theirs.modules and theirs.fit(model.modules):
            names, alphas = theirs, beside
    if names.unknown:
        because = f" ({note})" if note else ""
        raise PpclError(f"{where}: {names.unknown[0]!r} is no part of a LoRA that is known here{because}; {LAYOUT}")
    left_out = sorted({name.split(".")[0] for name in names.others} - set(elsewhere))
    if left_out:
        log.warning("%s: left out, as their names are not the transformer's: %s", where, ", ".join(left_out))
    if not names.modules:
        return Lora(where)
    _check(where, names.tensors, names.modules)
    mine = settings(where, metadata if metadata is not None else found, prefix)
    start = f"{prefix}." if prefix else ""
    given = {name.removeprefix(start): value for name, value in (alphas or {}).items() if name.startswith(start)}
    if mine is not None and (names.alphas or given):
        raise PpclError(f"{where}: it has alphas and PEFT's settings, which may differ; remove one of them")
    of = {*names.alphas, *(name.split(".lora_")[0].removesuffix(".alpha") for name in given)}
    of_none = of - names.modules.keys()
    if of_none:
        log.warning("%s: %d of its alphas are of no layer of it, the first of %r", where, len(of_none), min(of_none))
    other = [path for path in names.alphas if path in names.modules and f"{path}.lora_A.weight" not in names.tensors]
    if other:
        raise PpclError(f"{where}: {other[0]} has LoKr's factors and an alpha, which diffusers does not read here")
    if names.alphas:
        ranks = {path: names.tensors[f"{path}.lora_A.weight"].shape[0] for path in names.modules}
        mine = of_layers(ranks, names.alphas)
    return Lora(where, names.tensors, list(names.modules), mine, given, note)


def _sorted(tensors: Mapping[str, torch.Tensor], prefix: str | None) -> _Names:
    """Sort names into parts of layers, alphas, and those that say nothing here."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    start = next((s for s in (f"{prefix or ''}.", *PREFIXES) if any(name.startswith(s) for name in tensors)), "")
    mine = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    # Only other components: a LoRA of a text encoder, for example.
    if prefix and not start and all(name.startswith("text_encoder") for name in tensors):
        mine = {}
    names = _Names(others=[name for name in tensors if not mine or not name.startswith(start)])
    if not any(".lora_A" in name for name in mine):
        before = mine.keys()
        mine = convert_unet_state_dict_to_peft(mine)
        names.renamed = mine.keys() != before
    for name, tensor in mine.items():
        match = PART.fullmatch(name)
        if name.endswith(".alpha") and tensor.numel() == 1:
            names.alphas[name.removesuffix(".alpha")] = float(tensor)
            continue
        part, kind = ("", None) if match is None else (FACTORS.get(match["part"], match["part"]), match["kind"])
        if match is None or (kind or "") not in KINDS.get(part, ("", ".weight")):
            names.unknown.append(name)
            continue
        names.renamed |= part != match["part"]
        names.modules[match["module"]] = None
        own = f"{match['module']}.{part}{kind if part in KINDS else ''}"
        if own in names.tensors:
            names.unknown.append(name)
        names.tensors[own] = tensor
    names.renamed |= bool(names.alphas)
    return names


def _check_values(where: str, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, Any]) -> None:
    """Raise where a number is not finite, or an alpha is negative: diffusers' converters never end on one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise PpclError(f"{where}: {name} is not finite everywhere; the file is damaged, or training failed")
    given = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")} | dict(alphas)
    for name, value in given.items():
        if not all(0 <= alpha < math.inf for alpha in torch.as_tensor(value).flatten().tolist()):
            raise PpclError(f"{where}: {name} is {value}; an alpha is a finite number, 0 or more")


def _check(where: str, tensors: Mapping[str, torch.Tensor], modules: Iterable[str]) -> None:
    for module in sorted(modules):
        down, up = (tensors.get(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
        if down is None and up is None and any(f"{module}.{part}" in tensors for part in LOKR):
            continue
        if down is None or up is None:
            raise PpclError(f"{where}: {module} has one of the two factors of a LoRA only; save it again")
        if down.ndim < 2 or up.ndim != down.ndim or down.shape[0] != up.shape[1] or not down.is_floating_point():
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise PpclError(f"{where}: the factors of {module} do not fit each other ({shapes}); save it again")


def _open(
    source: str | Path | Mapping[str, torch.Tensor], weight_name: str | None
) -> tuple[str, dict[str, torch.Tensor], dict[str, Any] | None]:
    if isinstance(source, Mapping):
        return "the LoRA", dict(source), None
    path = Path(source)
    if not path.exists():
        raise PpclError(f"{path}: no such LoRA; give a safetensors file or a folder (the hub is the pipeline's matter)")
    config = None
    if path.is_dir():
        there = sorted(file.name for file in path.glob("*.safetensors"))
        named = next((name for name in FILES if name in there), there[0] if len(there) == 1 else None)
        if weight_name is None and named is None:
            have = ", ".join(there) or "none"
            raise PpclError(f"{path}: which of its safetensors files is the LoRA ({have})? give the file itself")
        path = inside(path, weight_name or str(named))
        if (path.parent / CONFIG).is_file():
            config = read_json(inside(path.parent, CONFIG), _Any).model_dump()
    if path.suffix != ".safetensors":
        raise PpclError(f"{path}: only safetensors files are read, other kinds may hold code; convert it first")
    tensors = read_safetensors(path)
    return str(path), tensors, config or _header(path)


class _Any(BaseModel):
    model_config = ConfigDict(extra="allow")


def _header(path: Path) -> dict[str, Any] | None:
    text = safetensors_metadata(path).get(METADATA)
    if text is None:
        return None
    try:
        values = parse_json(text.encode())
    except ValueError as error:
        raise PpclError(f"{path}: its {METADATA} is no JSON ({error}); save the LoRA again") from None
    return values if isinstance(values, dict) else None


@functools.cache
def loader_of(transformer: str) -> Any:
    """Return the LoRA mixin of a pipeline of diffusers that takes a transformer of this class, or ``None``.

    Pipelines are imported one by one, those first whose names resemble the transformer's.
    """
    from diffusers import pipelines
    from diffusers.loaders.lora_base import LoraBaseMixin

    def unlike(name: str) -> float:
        return -difflib.SequenceMatcher(None, name.lower(), transformer.lower()).ratio()

    for name in sorted((name for name in dir(pipelines) if name.endswith("Pipeline")), key=unlike):
        pipeline = getattr(pipelines, name)
        if not (inspect.isclass(pipeline) and issubclass(pipeline, LoraBaseMixin)):
            continue
        parameters = inspect.signature(pipeline.__init__).parameters
        component = parameters.get(getattr(pipeline, "transformer_name", ""))
        if component is not None and transformer in _classes(component.annotation):
            return next(base for base in pipeline.__mro__ if "lora_state_dict" in vars(base))
    return None


def _classes(annotation: Any) -> set[str]:
    """The names of the classes in an annotation: a class, a union, or the text of one."""
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")}
    return {getattr(kind, "__name__", "") for kind in typing.get_args(annotation) or (annotation,)}


def converted(
    transformer: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Read a LoRA for a class of transformers as ``pipe.load_lora_weights`` of its pipeline does.

    Returns:
        The tensors by diffusers' names, the component before them, and the alphas that it gives beside them; both are
        empty where the converter could not. Then what to say where that does not help, empty where there is none.
    """
    loader = loader_of(transformer)
    if loader is None:
        return {}, {}, ""
    note = f"{loader.__name__} of diffusers does not convert it"
    options = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(loader.lora_state_dict).parameters:
        options["return_alphas"] = True
    try:
        found = loader.lora_state_dict(dict(tensors), **options)
    except FAULTS as error:
        return {}, {}, f"{note} ({line(error)})"
    return found[0], (found[1] if len(found) == 3 else None) or {}, note
