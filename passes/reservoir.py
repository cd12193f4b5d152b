"""A bounded, reproducible choice of the sample-timesteps whose activations are kept while the teacher runs
once."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Key = tuple[str, str]
"""Stack name and stream."""

CHUNK_BYTES = 256 * 2**20
"""Memory for one batch of kept samples while curves are computed: features or Gram matrices of all blocks."""


class Reservoir:
    """Keeps the activations of at most `samples` samples in at most `memory` bytes of host memory.

    Each sample of each call gets a rank from a fixed random sequence, and the lowest ranks stay: the choice
    is uniform over all samples, the same in each run, and needs to know neither how many calls follow nor how
    large they are.
    """

    def __init__(self, samples: int, memory: int) -> None:
        self.samples = samples
        self.memory = memory
        self._kept: list[tuple[float, int, dict[Key, list[Tensor]]]] = []
        self._bytes = 0
        self._added = 0
        self._ceiling = 1.0

    def __len__(self) -> int:
        return len(self._kept)

    def ranks(self, call: int, batch: int) -> list[float]:
        """Ranks in [0, 1) of the samples of the call at position `call`."""
        generator = random.Random(call)
        return [generator.random() for _ in range(batch)]

    def wants(self, rank: float) -> bool:
        """Whether a sample of this rank would stay now; False is final."""
        return rank < self._ceiling

    def add(self, rank: float, activations: dict[Key, list[Tensor]]) -> None:
        """Keep one sample: for each stack and stream, ``[T, D]`` before the stack and after each block; drop
        what no longer fits.

        At least one sample always stays, however large.
        """
        if not self.wants(rank):
            return
        heapq.heappush(self._kept, (-rank, self._added, activations))
        self._added += 1
        self._bytes += _bytes(activations)
        while len(self._kept) > 1 and (len(self._kept) > self.samples or self._bytes > self.memory):
            dropped, _, tensors = heapq.heappop(self._kept)
            self._bytes -= _bytes(tensors)
            self._ceiling = -dropped

    def batches(self, key: Key, device: torch.device) -> Iterator[list[Tensor]]:
        """The kept samples of one stack and stream, in batches of equal shapes.

        A batch is ``[B, T, D]`` before the stack, then after each block.
        """
        by_shape: dict[tuple[int, ...], list[list[Tensor]]] = defaultdict(list)
        for _, _, activations in sorted(self._kept, key=lambda entry: entry[1]):
            by_shape[tuple(activations[key][0].shape)].append(activations[key])
        for (tokens, width), group in by_shape.items():
            each = len(group[0]) * tokens * width * 4
            size = max(1, CHUNK_BYTES // each)
            for start in range(0, len(group), size):
                yield _stacked(group[start : start + size], device)


def _stacked(group: Sequence[list[Tensor]], device: torch.device) -> list[Tensor]:
    return [torch.stack(blocks).to(device) for blocks in zip(*group, strict=True)]


def _bytes(activations: dict[Key, list[Tensor]]) -> int:
    return sum(tensor.nbytes for blocks in activations.values() for tensor in blocks)
