"""Muon, an optimizer for matrices, with all matrices of one shape handled in one batch.

It does what ``torch.optim.Muon`` does with ``adjust_lr_fn="match_rms_adamw"``, but on a CPU a batch of
small products is several times quicker than one product after another.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

_TERMS = (3.4445, -4.775, 2.0315)
_ROUNDS = 5


def orthogonal(batch: torch.Tensor) -> torch.Tensor:
    """Return nearly the closest matrices with orthonormal rows or columns, for (count, rows, columns).

    Five Newton-Schulz rounds in bfloat16; singular values end up near 1.
    """
    tall = batch.shape[-2] > batch.shape[-1]
    x = (batch.mT if tall else batch).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _TERMS
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as the step of each matrix.

    Args:
        matrices: weights with two dimensions.
        lr: learning rate, on AdamW's scale.
        momentum: share of the running gradient kept at each step.
        weight_decay: share of the weights lost at each step, times the learning rate.
    """

    def __init__(
        self, matrices: list[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix once; each must have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._move(weights, group)

    def _move(self, weights: list[Any], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        slots = []
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            slots.append(self.state[weight]["momentum_buffer"])
        slopes = [weight.grad for weight in weights]
        torch._foreach_lerp_(slots, slopes, 1 - group["momentum"])
        ahead = torch.lerp(torch.stack(slopes), torch.stack(slots), group["momentum"])
        step = orthogonal(ahead)
        size = group["lr"] * 0.2 * max(weights[0].shape) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(step.unbind(0)), alpha=-size)
