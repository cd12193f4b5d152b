"""Which recorded calls are held out: what a fit or a training is judged on and never sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call


def hold_out(calls: Sequence[Call], share: float, seed: int) -> list[int]:
    """Return the positions of the calls to hold out, in order: about a share of two or more, and never all.

    A function of the calls' prompts, the share and the seed alone. Calls of the same prompts stay on one side where
    there are prompts enough: what they share would make the result too good.
    """
    together: dict[Any, list[int]] = {}
    for index in range(len(calls)):
        together.setdefault(calls[index].prompts, []).append(index)
    if len(together) * share < 1:
        together = {index: [index] for index in range(len(calls))}
    parts = random.Random(f"ppcl-fx held out {seed}").sample(list(together.values()), len(together))
    count = min(len(parts) - 1, max(1, round(len(parts) * share)))
    return sorted(index for part in parts[:count] for index in part)
