"""The options of analysis and of rewriting: flags, Python and docs are made from these two models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ppcl_fx.errors import near
from ppcl_fx.io.options import MOST_STEPS, Bytes, Config, Count, Flag, Seed, Share

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
MOST_PARAMS = 10**15
MemoryLimit = Annotated[
    Bytes | None,
    Field(description="leave the weights on disk and work block by block within this much memory, such as 12GiB"),
]
Device = Annotated[str, Flag(metavar="DEVICE"), Field(description="where --memory-limit computes: 'cpu', 'cuda'")]


class AnalyzeConfig(Config):
    """Every option of `ppcl_fx.analyze` and of ``ppcl-fx analyze``; what is recorded by is the command's alone."""

    batch_size: int = Field(8, ge=1, le=MOST_STEPS, description="prompts in one run of the pipeline")
    steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="denoising steps; the pipeline's own number if left out"
    )
    seed: Seed = Field(42, description="seed of everything random")
    stream: str = Field("image", description="stream whose curves decide the intervals")
    ridge: float = Field(
        1e-6,
        ge=0.0,
        le=1e6,
        allow_inf_nan=False,
        description="ridge of the probes, relative to the mean squared channel",
    )
    refine_steps: int = Field(0, ge=0, le=10**6, description="gradient steps on the probes after the closed form")
    samples: Count = Field(160, description="samples that CKA averages over, at most")
    memory_limit: MemoryLimit = None
    device: Device = "cpu"


def _params(value: object) -> object:
    """Return the number of parameters that ``12B``, ``11.9e9``, ``500M`` or ``2705371`` stands for."""
    if not isinstance(value, str):
        return value
    digits, unit = (value[:-1], UNITS[value[-1:].upper()]) if value[-1:].upper() in UNITS else (value, 1)
    try:
        number = float(digits) * unit
    except ValueError:
        number = 0.0
    if not 1.0 <= number <= MOST_PARAMS:  # NaN fails too
        raise ValueError("not a number of parameters; give one such as 12B, 500M or 2705371")
    return round(number)


RULE_NAMES = ["budget", "paper", "uniform"]
"""Names of the rules that choose; `ppcl_fx.passes.selection.select.rule` adds others."""


def _rule(value: str | None) -> str | None:
    if value is not None and value not in RULE_NAMES:
        raise ValueError(f"not one of {', '.join(RULE_NAMES)}{near(value, RULE_NAMES)}")
    return value


class RewriteConfig(Config):
    """Every option of `ppcl_fx.select` and of ``ppcl-fx rewrite``: the budget, and how a plan is chosen."""

    keep: Share | None = Field(None, description="share of the parameters that stays, 0.5 if left out")
    params: Annotated[int | None, BeforeValidator(_params), Flag(metavar="NUMBER")] = Field(
        None, ge=1, le=MOST_PARAMS, description="instead of --keep: how many stay at most, such as 12B"
    )
    latency: Annotated[float | str | None, Flag(metavar="SHARE_OR_MS")] = Field(
        None,
        description="instead of --keep: how much of the teacher's time may stay, a share such as 0.6 or a time such as "
        "120ms; by --costs",
    )
    select: Annotated[str | None, AfterValidator(_rule), Flag(also=("--rule",), metavar="RULE")] = Field(
        None,
        description="how to choose: 'paper' if left out, 'budget' for the least predicted damage (if left out with "
        "--latency), or 'uniform' as a control",
    )
    stream: str | None = Field(None, description="stream that decides; the one of the analysis if left out")
    init: Annotated[Literal["first", "middle"], Flag(metavar="BLOCK")] = Field(
        "first", description="block a student starts from: 'first' or 'middle'"
    )
    width: bool = Field(True, description="allow feed-forward and text-stream projectors")
    ffn: Annotated[int, Flag(hidden=True)] = Field(3, ge=0, description="blocks whose feed-forwards may go")
    text_cka: Annotated[float, Flag(hidden=True)] = Field(
        0.999, description="least text-stream similarity for a text-stream edit"
    )
    memory_limit: MemoryLimit = None
    device: Device = "cpu"
