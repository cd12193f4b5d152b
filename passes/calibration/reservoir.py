"""A bounded, reproducible choice of the samples whose activations are kept while the teacher runs once."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

CHUNK_BYTES = 256 * 2**20
"""Memory for one batch of kept samples while curves are computed: features or Gram matrices of all blocks."""

Sample = tuple[int, int]
"""Position of a call, and row of a sample in it."""


def ranks(call: int, batch: int) -> list[float]:
    """Ranks in [0, 1) of the samples of the call at position `call`: a fixed random sequence."""
    generator = random.Random(call)
    return [generator.random() for _ in range(batch)]


class Reservoir:
    """Chooses at most `samples` samples that take at most `memory` bytes; one always stays, however large.

    Each sample of each call gets a rank from a fixed random sequence, and the lowest ranks stay: the choice is uniform
    over all samples, the same in each run, and needs to know neither how many calls follow nor how large they are. What
    is left out stays out. So sizes may become known stack by stack: with part of them the choice is larger than in the
    end, never smaller.
    """

    def __init__(self, samples: int, memory: int) -> None:
        self.samples = samples
        self.memory = memory
        self._sizes: dict[Sample, int] = {}
        self._ranked: list[tuple[float, Sample]] = []
        self._bytes = 0
        self._ceiling = 1.0

    def note(self, call: int, batch: int, nbytes: int) -> list[Sample]:
        """Add `nbytes` to the size of each of the `batch` samples of a call, and return the samples that are dropped.

        Calls come in order at first.
        """
        for row, rank in enumerate(ranks(call, batch)):
            if rank < self._ceiling:
                if (call, row) not in self._sizes:
                    heapq.heappush(self._ranked, (-rank, (call, row)))
                self._sizes[call, row] = self._sizes.get((call, row), 0) + nbytes
                self._bytes += nbytes
        dropped = []
        while len(self._sizes) > 1 and (len(self._sizes) > self.samples or self._bytes > self.memory):
            rank, sample = heapq.heappop(self._ranked)
            self._ceiling = -rank
            self._bytes -= self._sizes.pop(sample)
            dropped.append(sample)
        return dropped

    def __contains__(self, sample: Sample) -> bool:
        """Tell whether a sample stays, by what is known so far."""
        return sample in self._sizes

    def kept(self) -> list[Sample]:
        """Return the samples that stay, in the order in which they came."""
        return list(self._sizes)


def groups(shapes: Sequence[tuple[int, ...]], states: int) -> Iterator[list[int]]:
    """Positions of samples that curves are computed for together: of one shape ``[T, D]``, and few enough.

    A sample has so many `states` of its shape.
    """
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        by_shape[shape].append(position)
    for (tokens, width), group in by_shape.items():
        size = max(1, CHUNK_BYTES // (states * tokens * width * 4))
        for start in range(0, len(group), size):
            yield group[start : start + size]
