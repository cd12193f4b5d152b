"""The curves of a stream: surrogate curves (Eq. 3), the gap of Eq. 6 of the same surrogates, the teacher's heatmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppcl_fx.passes.analysis.probes import Projector
from ppcl_fx.passes.analysis.similarity import Average, Comparer, comparer, directional_gap
from ppcl_fx.passes.calibration.normal_sums import products_of
from ppcl_fx.passes.calibration.reservoir import CHUNK_BYTES
from ppcl_fx.schema.analysis import Matrix

CACHED_BYTES = 4 * 2**20
"""Surrogates that are compared at once: small memory is used again, large memory comes anew from the system."""

ROWS = 1024
"""Tokens that go through a probe at once, for the same reason."""


@dataclass(frozen=True)
class Curves:
    """Matrices of one stream: ``cka(u, k)`` (Eq. 3), the directional gap of the same surrogates, the heatmap."""

    cka: Matrix
    gap: Matrix
    similarity: Matrix


class CurveSums:
    """The curves of one stream of one stack while samples come in.

    Each surrogate is built on the one before it, so a batch costs one probe product for each pair u < k. Surrogates of
    several u go through a probe together.
    """

    def __init__(self, size: int) -> None:
        self.surrogate, self.gap, self.heat = Average(size), Average(size), Average(size)

    def add(
        self, outputs: Sequence[Tensor], probes: Sequence[Projector], tick: Callable[[int], None] = lambda pairs: None
    ) -> None:
        """Add a batch of samples: one tensor ``[B, T, D]`` for each block's output, and each block's probe.

        `tick` is told again and again how many pairs u < k were done.
        """
        size = len(probes)
        assert len(outputs) == size, "one output for each block"
        states = comparer(outputs)
        heat = states.heat().cpu()
        for u in range(size):
            one = torch.where(heat[:, u, u].isnan(), float("nan"), 1.0)
            self.surrogate.add(u, u, one)
            self.heat.add(u, u, one)
            self.gap.add(u, u, torch.zeros(len(one)))
            for k in range(u + 1, size):
                self.heat.add(u, k, heat[:, u, k])
                self.heat.add(k, u, heat[:, u, k])
        step = max(1, CHUNK_BYTES // (4 * outputs[0].numel()))
        done = 0
        for first in range(0, size - 1, step):
            starts = range(first, min(first + step, size - 1))
            for pairs in self._surrogates(outputs, probes, states, starts):
                done += pairs
                tick(done)

    def _surrogates(
        self, outputs: Sequence[Tensor], probes: Sequence[Projector], states: Comparer, starts: range
    ) -> Iterator[int]:
        """Follow the surrogates that start at these blocks through all probes behind them; give the pairs of each."""
        states.choose(starts.start, starts.stop)
        together = max(1, CACHED_BYTES // (4 * outputs[0].numel()))
        x = torch.empty(len(starts), *outputs[0].shape, dtype=torch.float32, device=outputs[0].device)
        for k in range(starts.start + 1, len(outputs)):
            if k - 1 in starts:
                x[k - 1 - starts.start] = outputs[k - 1]
            live = x[: k - starts.start]
            with products_of(outputs[k].dtype, x.device):
                # The teacher's own states are rounded as coarsely.
                for rows in live.flatten(0, 2).split(ROWS):
                    rows.copy_(probes[k](rows))
            for at, some in zip(range(0, len(live), together), live.split(together), strict=True):
                found = states.against(at, some).cpu()
                gaps = [directional_gap(made, outputs[k]) for made in some]
                for u, (values, gap) in enumerate(zip(found, gaps, strict=True), start=starts.start + at):
                    self.surrogate.add(u, k, values)
                    self.gap.add(u, k, gap)
            yield len(live)

    def tensors(self) -> dict[str, Tensor]:
        """The sums and counts in use, by name: what is written to them counts."""
        averages = {"cka": self.surrogate, "gap": self.gap, "heat": self.heat}
        return {f"{name}.{part}": t for name, mean in averages.items() for part, t in mean.tensors.items()}

    def curves(self) -> Curves:
        """The means over all samples so far."""
        return Curves(self.surrogate.matrix(), self.gap.matrix(), self.heat.matrix())
