"""Least-squares fits that are judged on what they were not solved from, and whether there was enough to solve from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ppcl_fx.calls.store import hold_out
from ppcl_fx.errors import PpclError
from ppcl_fx.passes.analysis.probes import NormalEquations, Projector

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call

SHARE = 0.2
"""Of the calls that fits are judged on; of the samples or tokens, where there is one call."""

ENOUGH = 4
"""Tokens a channel below which a fit is rough. With n independent tokens of D channels a map misses n / (n - D) times
what it cannot know: a third more than the best map at 4 D, and everything at D, where it fits whatever it is given."""

LEAST = 0.5
"""Tokens a channel below which no map is solved: of most directions it would know nothing."""

Kind = Literal["calls", "samples", "tokens"]


class Division:
    """Which tokens of some calls, in the order in which they run, fits are solved from, and which they are judged on.

    With several calls it is calls that are held out, of other prompts where these suffice. With one call of several
    samples it is the last samples, and of a single sample every fifth token.

    Attributes:
        calls: how many.
        kind: what is held out.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        self._held = frozenset(hold_out(calls, SHARE, 0)) if len(calls) > 1 else frozenset[int]()
        self._batch = calls[0].batch if len(calls) == 1 else 0
        self.kind: Kind = "calls" if self.calls > 1 else "samples" if self._batch > 1 else "tokens"
        self._now = 0

    def begin(self, position: int) -> None:
        """A call starts."""
        self._now = position

    def parts(self, x: Tensor, y: Tensor) -> list[tuple[bool, Tensor, Tensor]]:
        """Divide the call's tokens, ``[..., D]`` twice, in parts: whether it is held out, and the tokens."""
        if self.calls > 1:
            return [(self._now in self._held, x, y)]
        if x.ndim == y.ndim and len(x) == 1:
            x = x.expand_as(y)  # one text for all samples, as in `NormalEquations.add`
        if self._batch > 1 and x.ndim > 2 and len(x) == self._batch:
            at = self._batch - max(1, round(self._batch * SHARE))
            return [(False, x[:at], y[:at]), (True, x[at:], y[at:])]
        x, y = (value.reshape(-1, value.shape[-1]) for value in (x, y))
        held = torch.arange(len(x), device=x.device) % round(1 / SHARE) == 0
        return [(False, x[~held], y[~held]), (True, x[held], y[held])]


class HeldOutFit:
    """The normal equations of one residual map (`NormalEquations`), those of the held-out tokens apart.

    `fit` and `error` judge a map on the tokens that are held out; messages call it by its name.
    """

    def __init__(self, name: str, division: Division, bias: bool = False) -> None:
        self._name, self._division = name, division
        self._solved, self._judged = NormalEquations(bias), NormalEquations(bias)
        self.fit, self.error = self._judged.fit, self._judged.error

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a call's tokens, both ``[..., D]``. Raises `PpclError` where a value is NaN or infinite."""
        for held, some, others in self._division.parts(x, y):
            (self._judged if held else self._solved).add(some, others)

    def solve(self, ridge: float = 1e-6, refine_steps: int = 0) -> Projector:
        """Return the map that the tokens which are not held out determine. Raises `PpclError`: they are too few; the
        line says how many calls would do. Or as `NormalEquations.solve`.
        """
        enough(self._name, self._solved, self._division.calls, self.tokens)
        return self._solved.solve(ridge, refine_steps)

    @property
    def few(self) -> str:
        """What to say of fits from so few tokens; empty where there are enough."""
        return enough(self._name, self._solved, self._division.calls, self.tokens)

    @property
    def tokens(self) -> int:
        """The tokens of all calls, held out or not."""
        return self._solved.samples + self._judged.samples

    @property
    def energy(self) -> float:
        """Mean squared length of a token of y, over all tokens."""
        parts = (self._solved, self._judged)
        return sum(part.energy * part.samples for part in parts) / max(1, self.tokens)

    def clear(self) -> None:
        """Forget all tokens."""
        self._solved.clear()
        self._judged.clear()


def enough(name: str, sums: NormalEquations, calls: int, tokens: int) -> str:
    """Return what to say where a map is solved from few tokens, with the number of calls that would do; else "".

    `sums` are of the tokens that it is solved from; `tokens` are those of all calls, held out or not.

    Raises:
        PpclError: there are fewer than `LEAST` tokens a channel.
    """
    width, samples = sums.width, sums.samples
    if samples >= ENOUGH * width:
        return ""
    # Of few calls one is held out, of more a quarter at most.
    wanted = ENOUGH * width * calls / max(1, tokens)
    if tokens > samples:
        wanted = wanted / 0.75 if wanted > 3 else wanted + 1
    advice = f"record {math.ceil(wanted)} calls like these, {calls} were given"
    if samples < LEAST * width:
        what = f"fits {samples} tokens whatever they are, so it would say nothing"
        raise PpclError(f"{name}: a map of {width} channels {what}; {advice}")
    return f"{name}: a map of {width} channels from {samples} tokens is rough; {advice}"
