"""A bounded, reproducible choice of the sample-timesteps whose activations are kept while the teacher runs
once."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, str]
"""Stack name and stream."""

CHUNK_BYTES = 256 * 2**20
"""Memory for one batch of kept samples while curves are computed: features or Gram matrices of all blocks."""


def ranks(call: int, batch: int) -> list[float]:
    """Ranks in [0, 1) of the samples of the call at position `call`: a fixed random sequence."""
    generator = random.Random(call)
    return [generator.random() for _ in range(batch)]


class Reservoir:
    """Keeps the activations of at most `samples` samples in at most `memory` bytes of host memory.

    Each sample of each call gets a rank from a fixed random sequence, and the lowest ranks stay: the choice
    is uniform over all samples, the same in each run, and needs to know neither how many calls follow nor how
    large they are.
    """

    def __init__(self, samples: int, memory: int) -> None:
        self.samples = samples
        self.memory = memory
        self._kept: list[tuple[float, int, Any]] = []
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._added = 0
        self._ceiling = 1.0

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, rank: float) -> bool:
        """Whether a sample of this rank would stay now; False is final."""
        return rank < self._ceiling

    def add(self, rank: float, activations: dict[Key, list[Tensor]]) -> None:
        """Keep one sample: for each stack and stream, ``[T, D]`` before the stack and after each block; drop
        what no longer fits.

        At least one sample always stays, however large.
        """
        self.offer(rank, _bytes(activations), activations)

    def offer(self, rank: float, nbytes: int, what: Any) -> None:
        """Keep something of `nbytes` bytes that stands for one sample."""
        if not self.wants(rank):
            return
        heapq.heappush(self._kept, (-rank, self._added, what))
        self._sizes[self._added] = nbytes
        self._added += 1
        self._bytes += nbytes
        while len(self._kept) > 1 and (len(self._kept) > self.samples or self._bytes > self.memory):
            dropped, number, _ = heapq.heappop(self._kept)
            self._bytes -= self._sizes.pop(number)
            self._ceiling = -dropped

    def entries(self) -> list[Any]:
        """What is kept, in the order in which it came."""
        return [what for _, _, what in sorted(self._kept, key=lambda entry: entry[1])]

    def batches(self, key: Key, device: torch.device) -> Iterator[list[Tensor]]:
        """The kept samples of one stack and stream, in batches of equal shapes.

        A batch is ``[B, T, D]`` before the stack, then after each block.
        """
        every = [activations[key] for activations in self.entries()]
        for group in groups([tuple(states[0].shape) for states in every], len(every[0]) if every else 0):
            yield _stacked([every[i] for i in group], device)


class Choice:
    """The samples that a `Reservoir` keeps, from their ranks and sizes alone.

    A run that does one block at a time learns the sizes stack by stack. With part of the sizes the choice is larger
    than in the end, never smaller: a sample that was left out stays out.
    """

    def __init__(self, samples: int, memory: int) -> None:
        self.samples = samples
        self.memory = memory
        self._sizes: dict[tuple[int, int], int] = {}
        self._ranks: dict[tuple[int, int], float] = {}
        self._kept: list[tuple[int, int]] | None = None

    def note(self, call: int, batch: int, nbytes: int) -> None:
        """Add `nbytes` to the size of each of the `batch` samples of a call; calls come in order at first."""
        for row, rank in enumerate(ranks(call, batch)):
            self._sizes[call, row] = self._sizes.get((call, row), 0) + nbytes
            self._ranks[call, row] = rank
        self._kept = None

    def kept(self) -> list[tuple[int, int]]:
        """Call and row of the samples that stay, in order."""
        if self._kept is None:
            reservoir = Reservoir(self.samples, self.memory)
            for sample, nbytes in self._sizes.items():
                reservoir.offer(self._ranks[sample], nbytes, sample)
            self._kept = reservoir.entries()
        return self._kept


def groups(shapes: Sequence[tuple[int, ...]], states: int) -> Iterator[list[int]]:
    """Positions of samples that curves are computed for together: of one shape ``[T, D]``, and few enough.

    Args:
        shapes: of each sample.
        states: how many tensors of that shape a sample has.
    """
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, shape in enumerate(shapes):
        by_shape[shape].append(position)
    for (tokens, width), group in by_shape.items():
        size = max(1, CHUNK_BYTES // (states * tokens * width * 4))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _stacked(group: Sequence[list[Tensor]], device: torch.device) -> list[Tensor]:
    return [torch.stack(blocks).to(device) for blocks in zip(*group, strict=True)]


def _bytes(activations: dict[Key, list[Tensor]]) -> int:
    return sum(tensor.nbytes for blocks in activations.values() for tensor in blocks)
