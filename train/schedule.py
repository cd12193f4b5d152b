"""The optimiser and its learning rate: AdamW, a warm-up, half a cosine."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppcl_fx.errors import PpclError

BETAS = (0.9, 0.95)
"""AdamW's betas in the paper (Sec. 4.1)."""
WEIGHT_DECAY = 0.02
"""AdamW's weight decay in the paper (Sec. 4.1)."""


EIGHT_BIT = "bitsandbytes"
"""The package of the 8-bit AdamW."""
EIGHT_BIT_FROM = 4096
"""Values from which on a parameter's averages take a byte each; those of smaller ones stay float32."""


def warmup_steps(total: int) -> int:
    """Return the length of the warm-up of a run of `total` steps: a twentieth, at least 1 and at most 100."""
    return min(100, max(1, total // 20))


def factor(step: int, total: int, warmup: int | None = None) -> float:
    """Return the share of the peak learning rate at `step` (from 0) of `total`: linear up over `warmup` steps
    (None: `warmup_steps`), then half a cosine to 0.

    Nothing but the step goes in, so a resumed run needs no state of a scheduler.
    """
    warmup = warmup_steps(total) if warmup is None else min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / max(1, total - warmup + 1)))


def optimizer(
    groups: Mapping[str, Sequence[Parameter]],
    lr: float,
    *,
    kind: str = "adamw",
    betas: tuple[float, float] = BETAS,
    weight_decay: float = WEIGHT_DECAY,
) -> torch.optim.Optimizer:
    """Return AdamW over `groups` (edit id -> its parameters), one parameter group an edit, in the order given.

    Args:
        kind: "adamw", or "adamw8bit", whose two averages take a byte each for every parameter.

    Raises:
        PpclError: 8-bit AdamW is asked for and bitsandbytes is not installed.
    """
    named = [{"params": list(parameters), "name": name} for name, parameters in groups.items()]
    if kind == "adamw8bit":
        made: torch.optim.Optimizer = eight_bit().optim.AdamW8bit(
            named, lr=lr, betas=betas, weight_decay=weight_decay
        )
        return made
    return torch.optim.AdamW(
        named,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        fused=all(p.device.type in {"cpu", "cuda"} for parameters in groups.values() for p in parameters),
    )


def eight_bit() -> Any:
    """Return the package bitsandbytes. Raises PpclError where it is not installed."""
    try:
        return importlib.import_module(EIGHT_BIT)
    except ImportError as error:
        raise PpclError(
            f"training option optimizer: adamw8bit needs {EIGHT_BIT}, which is not here ({error}); "
            "pip install 'ppcl-fx[bnb]', or take adamw"
        ) from None


def try_eight_bit(device: torch.device) -> None:
    """Do one step of the 8-bit AdamW on `device`: it imports where its compiled half is missing, and fails at a step.

    Raises:
        PpclError: bitsandbytes is not installed, or cannot do a step on this device.
    """
    package = eight_bit()
    parameter = Parameter(torch.zeros(EIGHT_BIT_FROM, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        package.optim.AdamW8bit([parameter]).step()
        if float(parameter.detach().abs().max()) == 0.0:
            raise RuntimeError("a step changes nothing")
    except Exception as error:  # noqa: BLE001 - whatever it is, the person hears it before the training
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PpclError(
            f"training option optimizer: adamw8bit does not run on {device.type} with {EIGHT_BIT} "
            f"{package.__version__} ({reason}); take adamw"
        ) from None


def clip(groups: Mapping[str, Sequence[Parameter]], limit: float | None) -> dict[str, Tensor]:
    """Scale each group's gradients so that their joint L2 norm is at most `limit` (None: leave them).

    The norm is taken for each edit alone: a bad batch for one interval must not slow the others, which Eq. 6
    keeps apart.

    Returns:
        Edit id -> the norm before scaling, a scalar on the parameters' device.
    """
    norms: dict[str, Tensor] = {}
    for name, parameters in groups.items():
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Of sharded gradients each rank knows its own part of the norm.
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if limit is not None:
            clip_grads_with_norm_(parameters, limit, norms[name])
    return norms
