"""Pictures with captions as data: encoded once, with noise and its level drawn anew at each load."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError

from ppcl_fx.calls.store import Call, Calls, collate
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import inside, read_json
from ppcl_fx.train.core.batches import moved
from ppcl_fx.train.data.cache import CALLS, TEMPLATE, Part, cut, encode, find_parts, sample_digest
from ppcl_fx.train.data.source import BadSamples, SampledSource
from ppcl_fx.train.data.template import Template
from ppcl_fx.train.distributed.batch_split import SplitBatch, portion
from ppcl_fx.train.distributed.process_group import Place, current, wait_for
from ppcl_fx.train.images.captions import open_pairs
from ppcl_fx.train.images.encode import Encoder
from ppcl_fx.train.images.flow import Density, generator_of

OPEN = 128  # parts of the cache that are kept open


class ImageSource(SampledSource):
    """Calls at x_t = (1 - sigma) x_0 + sigma eps, from cached latents x_0. A `DistributedSource`.

    eps and sigma depend on the seed, the epoch and the sample alone: not on the batch size, the ranks, or what was
    drawn before. Samples are read when they are drawn, and compared with their checksums. All ranks draw the same
    batches; of its `shares` each reads no more than its own pictures. Arguments are those of `open_images`; `skips`
    holds the corrupt samples, those that could not be encoded included. Raises PpclError where these are more than 1
    %.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        template: Template,
        batch: int,
        seed: int,
        *,
        density: Density | None = None,
        place: Place | None = None,
        skips: BadSamples | None = None,
    ) -> None:
        if batch < 1:
            raise PpclError(f"the batch size is {batch}; use 1 or more")
        self._parts, self._template, self._density = parts, template, density or Density()
        place = place or Place()
        self._device, self._dtype = torch.device(place.device), place.dtype
        self._samples = [(part, i) for part in parts for i in range(len(part.card.names))]
        groups: dict[str, list[int]] = {}
        for index, (part, i) in enumerate(self._samples):
            groups.setdefault(part.card.groups[i], []).append(index)
        super().__init__(list(groups.values()), batch, seed)
        self.ranks, self._split = current() if place.ranks is None else place.ranks, False
        skipped = {name: why for part in parts for name, why in part.card.skipped.items()}
        self.skips = skips or BadSamples("the pictures", len(self._samples) + len(skipped), self.ranks)
        for name, why in skipped.items():
            self.skips.meet(name, why)
        self.skips.agree()
        self._names = [name for part in parts for name in part.card.names]
        self._drawn_from: list[int] = []
        self._calls = lru_cache(OPEN)(lambda folder: Calls.open(folder / CALLS, check=False))

    @property
    def fingerprint(self) -> str:
        """The hash of the encoded pictures and of how noise levels are drawn."""
        digests = [digest for part in self._parts for digest in part.card.digests]
        density = [self._density.name, self._density.mean, self._density.std]
        plain = json.dumps([self._template.model_dump(mode="json"), digests, density])
        return hashlib.sha256(plain.encode()).hexdigest()

    def split(self) -> Self:
        """Return the same batches as `ppcl_fx.train.distributed.batch_split.SplitBatch`: this rank's pictures."""
        other = copy.copy(self)
        other._split, other._last = True, (-1, [])
        return other

    def kwargs(self, step: int) -> dict[str, Any]:
        joined = moved(collate(self._drawn(step)), self._device, self._dtype)
        total = len(self._drawn_from)
        return SplitBatch(joined, portion(total, self.ranks)[2], total) if self._split else joined

    def target(self, step: int) -> None:
        """See `Feed`: the teacher has not seen these noisy pictures yet."""

    def samples(self, step: int) -> int:
        self._drawn(step)
        return len(self._drawn_from)

    def names(self, step: int) -> str:
        """See `Feed`: the pictures' names."""
        self._drawn(step)
        return ", ".join(self._names[index] for index in self._drawn_from)

    def _draw(self, step: int) -> list[Call]:
        """This rank's samples of a step's batch: its good ones, or another one where all of them are corrupt."""
        epoch, indices = self.place(step)
        while True:
            # Too many bad ones stop before none is left.
            good = self._good(indices) or self._good(range(len(self._samples)))[:1]
            first, last, _ = portion(len(good), self.ranks) if self._split else (0, len(good), 0)
            drawn = [call for index in good[first:last] if (call := self._sample(epoch, index)) is not None]
            # What one rank finds to be corrupt is left out by all, and the rest is shared out anew.
            if not self.skips.agree():
                self._drawn_from = good
                return drawn

    def _good(self, indices: Sequence[int]) -> list[int]:
        return [index for index in indices if self._names[index] not in self.skips.reasons]

    def _sample(self, epoch: int, index: int) -> Call | None:
        """A sample at its noise level of this epoch; None where it is corrupt."""
        part, number = self._samples[index]
        try:
            call = self._calls(part.folder)[number]
            if sample_digest(call) != part.card.digests[number]:
                raise PpclError("not what was encoded")
        except (PpclError, SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            self.skips.meet(self._names[index], f"{part.folder}: {reason}; remove that folder to encode it again")
            return None
        generator = generator_of(self._seed, epoch, index)
        sigma = self._template.sigma(self._density.draw(generator), part.card.mu[number])
        kwargs = self._template.at(call.kwargs, sigma, generator)
        return Call(kwargs, call.prompts, sigma, index, call.batch)


def open_images(
    encoder: Encoder,
    path: str | Path,  # as `ppcl_fx.train.images.captions.open_pairs` takes it
    cache: str | Path,  # a folder on a disk that all ranks see
    batch: int,  # pictures of one step
    seed: int,  # decides order, noise and noise levels
    *,
    density: Density | None = None,
    place: Place | None = None,
    progress: Callable[[int, int], None] | None = None,  # called with the pictures that are done and all of them
) -> ImageSource:
    """Encode what is not in the cache yet, all ranks together, and return the pictures as a source.

    The encoder is of a pipeline of a rectified flow, with its VAE and text encoders. Raises PpclError where the data
    or the pipeline is not supported, or more than 1 % of the pictures are corrupt.
    """
    place = place or Place()
    ranks = current() if place.ranks is None else place.ranks
    pairs = ranks.each(lambda: open_pairs(path))
    skips = BadSamples("the pictures", len(pairs), ranks)
    wanted = cut(pairs, ranks)
    folder = encode(encoder, wanted, cache, ranks=ranks, skips=skips, progress=progress)

    def read() -> tuple[list[Part], Template]:
        parts = find_parts(folder, wanted, ranks)
        wait_for(folder / TEMPLATE, ranks)
        return parts, read_json(inside(folder, TEMPLATE), Template)

    return ImageSource(*ranks.each(read), batch, seed, density=density, place=place, skips=skips)
