"""The settings that PEFT writes beside a LoRA: those that say what the tensors mean, checked before PEFT gets them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from ppcl_fx.errors import PpclError

FACTORS_ONLY = ("gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that draw the two factors and leave the teacher's weights as they were."""
ADVICE = "merge it into the teacher instead"


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class LoraSettings(BaseModel):
    """What PEFT's `LoraConfig` or `LoKrConfig` says about the meaning of the tensors.

    The other fields are about training. They are not handed on: some name modules to import or files to read.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str = "LORA"
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    alpha: FiniteFloat = 8
    rank_pattern: dict[Pattern, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, FiniteFloat] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    decompose_both: bool = False
    decompose_factor: int = -1


KEPT = ("r", "rank_pattern", "alpha_pattern")
OF_KIND = {
    "LORA": (*KEPT, "lora_alpha", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
    "LOKR": (*KEPT, "alpha", "decompose_both", "decompose_factor"),
}
"""The fields that PEFT's class of each kind takes."""


def settings(where: str, values: Mapping[str, Any] | None, prefix: str | None) -> dict[str, Any] | None:
    """Return the settings for one component, as PEFT's class takes them; ``None`` where there are none for it.

    `values` are those of one component or, each name behind the component's, of several. PpclError where one has
    another type or range, or makes of the LoRA what cannot be fused.
    """
    given = {name: value for name, value in (values or {}).items() if value is not None}
    if any("." in name for name in given):
        start = f"{prefix}."
        given = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    if not given:
        return None
    try:
        read = LoraSettings.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise PpclError(f"{where}: its setting {place!r}: {fault['msg'].lower()}; save it again") from None
    if read.peft_type not in OF_KIND:
        raise PpclError(f"{where}: {read.peft_type} is not supported, only LoRA and LoKr are; {ADVICE}")
    if isinstance(read.init_lora_weights, str) and read.init_lora_weights not in FACTORS_ONLY:
        raise PpclError(
            f"{where}: it began with init_lora_weights={read.init_lora_weights!r}, which changes the teacher's weights "
            "too, and they are not in it; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    from peft import LoraConfig

    for field in dataclasses.fields(LoraConfig):
        if field.metadata.get("is_lora_variant") and (read.model_extra or {}).get(field.name):
            raise PpclError(f"{where}: its setting {field.name!r} is not supported: it cannot be fused; {ADVICE}")
    return read.model_dump(include=set(OF_KIND[read.peft_type]))


def of_layers(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return settings that give each module its rank and alpha, by its path: the commonest as such, others by name.

    Where there is no alpha it is the rank.
    """
    full = {path: alphas.get(path, float(rank)) for path, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, full))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(path)}": value for path, value in full.items() if value != alpha},
    }
