"""The optimiser and its learning rate: AdamW, a warm-up, half a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

BETAS = (0.9, 0.95)
"""AdamW's betas in the paper (Sec. 4.1)."""
WEIGHT_DECAY = 0.02
"""AdamW's weight decay in the paper (Sec. 4.1)."""


def warmup_steps(total: int) -> int:
    """Return the length of the warm-up of a run of `total` steps: a twentieth, at least 1 and at most 100."""
    return min(100, max(1, total // 20))


def factor(step: int, total: int) -> float:
    """Return the share of the peak learning rate at `step` (from 0) of `total`: linear up, then half a cosine
    to 0.

    Nothing but the step goes in, so a resumed run needs no state of a scheduler.
    """
    warmup = warmup_steps(total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / max(1, total - warmup + 1)))


def optimizer(groups: Mapping[str, Sequence[Parameter]], lr: float) -> torch.optim.AdamW:
    """Return AdamW over `groups` (edit id -> its parameters), one parameter group an edit, in the order
    given.
    """
    return torch.optim.AdamW(
        [{"params": list(parameters), "name": name} for name, parameters in groups.items()],
        lr=lr,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        fused=all(p.device.type in {"cpu", "cuda"} for parameters in groups.values() for p in parameters),
    )


def clip(groups: Mapping[str, Sequence[Parameter]], limit: float | None) -> dict[str, Tensor]:
    """Scale each group's gradients so that their joint L2 norm is at most `limit` (None: leave them).

    The norm is taken for each edit alone: a bad batch for one interval must not slow the others, which Eq. 6
    keeps apart.

    Returns:
        Edit id -> the norm before scaling, a scalar on the parameters' device.
    """
    norms: dict[str, Tensor] = {}
    for name, parameters in groups.items():
        norms[name] = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit is not None:
            clip_grads_with_norm_(parameters, limit, norms[name])
    return norms
