"""The cache of encoded pictures: parts of calls with clean latents, each written once and named by what is in it.

``CACHE/<pipeline>/template.json`` says how the pipeline's calls are made, ``CACHE/<pipeline>/<part>/`` holds up to 64
calls and what is known of them. A part's name is the hash of its pictures and captions, so changed pictures are
encoded again and others are not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import inside, new_folder, read_json, write_json
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.train.core.batches import signature
from ppcl_fx.train.data.bad_samples import BadSamples
from ppcl_fx.train.data.template import Template, Unsupported, tensors_of
from ppcl_fx.train.distributed.process_group import ProcessGroup, wait_for
from ppcl_fx.train.images.captions import Pair
from ppcl_fx.train.images.encode import Encoder

PART = 64
"""Pictures of one part: what a kill may cost."""
CALLS, CARD, TEMPLATE = "calls", "samples.json", "template.json"
_log = logging.getLogger("ppcl_fx.train")


class CacheManifest(BaseModel):
    """What is known of a part without its tensors.

    Attributes:
        version: Of this layout.
        names: Of the samples, in the order of the calls.
        digests: Hash of the tensors of each sample.
        groups: Hash of what samples must share to come into one batch.
        mu: The scheduler's shift at each sample's size; None where it is static.
        skipped: What is wrong with the corrupt samples, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    names: list[str]
    digests: list[str]
    groups: list[str]
    mu: list[float | None]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Part:
    """A part of the cache that can be read."""

    folder: Path
    card: CacheManifest

    def calls(self) -> Calls:
        """Open the calls, without reading their tensors."""
        return Calls.open(self.folder / CALLS, check=False)


@dataclass(frozen=True)
class Pairs:
    """Pictures and captions that are encoded into one part, and the part's name in the cache."""

    name: str
    pairs: Sequence[Pair]


def cut(pairs: Sequence[Pair], ranks: ProcessGroup | None = None) -> list[Pairs]:
    """Return the parts of a data set; reads every picture's file, for the parts' names, each rank its share."""
    ranks = ranks or ProcessGroup()
    parts = [pairs[i : i + PART] for i in range(0, len(pairs), PART)]
    names = ranks.gather([_name(part) for part in parts[ranks.rank :: ranks.world]])
    return [Pairs(names[i % ranks.world][i // ranks.world], part) for i, part in enumerate(parts)]


def encode(
    encoder: Encoder,
    parts: Sequence[Pairs],
    cache: str | Path,
    *,
    ranks: ProcessGroup | None = None,
    skips: BadSamples | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode all pictures that the cache does not hold yet; the ranks take turns, a part each.

    A kill costs the parts that were being encoded, one a rank. A damaged part is encoded again.

    Args:
        encoder: The pipeline's.
        parts: Pictures and captions, as `cut` gives them.
        cache: The folder of the cache; parts that belong to other data stay there.
        ranks: This process among the others, which encode the same; None for one process.
        skips: Where corrupt pictures are counted.
        progress: Called with the pictures that are done and all of them, of all ranks together.

    Returns:
        The pipeline's folder in the cache.

    Raises:
        PpclError: More than 1 % of the pictures are corrupt, or the pipeline is not supported; in the same words on
            every rank.
    """
    ranks = ranks or ProcessGroup()
    folder = Path(cache) / encoder.key[:32]
    total = sum(len(part.pairs) for part in parts)
    skips = skips or BadSamples("the pictures", total, ranks)
    ranks.each(lambda: _know_template(encoder, folder))
    missing = _missing(folder, parts, ranks)
    done = total - sum(len(part.pairs) for part in missing)
    # In turns, so that no rank waits longer for the others than for one part, and all stop at once.
    for first in range(0, len(missing), ranks.world):
        turn = missing[first : first + ranks.world]
        ranks.each(partial(_encode_all, encoder, turn[ranks.rank : ranks.rank + 1], folder, skips))
        skips.agree()
        done += sum(len(part.pairs) for part in turn)
        if progress is not None:
            progress(done, total)
    return folder


def find_parts(folder: Path, parts: Sequence[Pairs], ranks: ProcessGroup | None = None) -> list[Part]:
    """Return the cached parts, in the order of `parts`, from the pipeline's folder in the cache.

    With several ranks it waits until this one sees what the others have encoded.

    Raises:
        PpclError: One is missing or damaged.
    """
    found = []
    for part in parts:
        place = folder / part.name
        wait_for(place, ranks or ProcessGroup())
        cached = _find(place)
        if cached is None:
            first = part.pairs[0].name
            raise PpclError(f"{place}: {first} and what follows is not encoded; encode the pictures first")
        found.append(cached)
    return found


def sample_digest(call: Call) -> str:
    """Return the hash of a call's tensors."""
    digests = {path: tensor_digest(tensor) for path, tensor in tensors_of(call.kwargs).items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def group_digest(call: Call) -> str:
    """Return the hash of what calls must share to be joined: the same in every process."""
    return hashlib.sha256(repr(_sorted(signature(call))).encode()).hexdigest()[:16]


def _sorted(mark: Any) -> Any:
    """A signature without sets, whose order differs from process to process."""
    if isinstance(mark, frozenset):
        return tuple(sorted(mark))
    return tuple(map(_sorted, mark)) if isinstance(mark, tuple) else mark


def _name(part: Sequence[Pair]) -> str:
    """The hash of names, captions and files."""
    digest = hashlib.sha256()
    for pair in part:
        try:
            content = hashlib.sha256(pair.read()).hexdigest() if pair.problem is None else pair.problem
        except OSError as error:
            content = f"unreadable: {error.strerror or error}"
        digest.update(json.dumps([pair.name, pair.caption, content]).encode())
    return digest.hexdigest()[:32]


def _find(place: Path) -> Part | None:
    """The part in a folder; None where there is none, or one that is damaged."""
    if not place.exists():
        return None
    try:
        part = Part(place, read_json(inside(place, CARD), CacheManifest))
        calls = part.calls() if part.card.names else []
        if {len(part.card.names)} != {len(calls), len(part.card.digests), len(part.card.groups), len(part.card.mu)}:
            raise PpclError(f"{place}: its card does not fit its calls")
    except PpclError as error:
        _log.warning("%s; that part is encoded again", error)
        return None
    return part


def _missing(folder: Path, parts: Sequence[Pairs], ranks: ProcessGroup) -> list[Pairs]:
    """The parts that are still to be encoded; each rank looks for its share, and all know the same ones."""
    mine = [part.name for part in parts[ranks.rank :: ranks.world] if _find(folder / part.name) is None]
    wanted = {name for names in ranks.gather(mine) for name in names}
    return list({part.name: part for part in parts if part.name in wanted}.values())


def _know_template(encoder: Encoder, folder: Path) -> None:
    if encoder.template is None and (folder / TEMPLATE).is_file():
        encoder.template = read_json(inside(folder, TEMPLATE), Template)


def _encode_all(encoder: Encoder, parts: Sequence[Pairs], folder: Path, skips: BadSamples) -> None:
    for part in parts:
        _encode(encoder, part.pairs, folder / part.name, skips)
        if encoder.template is not None and not (folder / TEMPLATE).is_file():
            write_json(folder / TEMPLATE, encoder.template)


def _encode(encoder: Encoder, part: Sequence[Pair], place: Path, skips: BadSamples) -> None:
    calls: list[Call] = []
    card = CacheManifest(names=[], digests=[], groups=[], mu=[], skipped={})
    for pair in part:
        try:
            call, mu = _one(encoder, pair)
        except Unsupported:
            raise
        except PpclError as error:
            card.skipped[pair.name] = str(error)
            skips.meet(pair.name, str(error))
            continue
        calls.append(Call(call.kwargs, call.prompts, call.timestep, len(calls), call.batch))
        card.names.append(pair.name)
        card.digests.append(sample_digest(call))
        card.groups.append(group_digest(call))
        card.mu.append(mu)
    with new_folder(place, replaces=owned.ENCODED_PART) as new:
        if calls:
            Calls(calls).save(new / CALLS)
        write_json(new / CARD, card)


def _one(encoder: Encoder, pair: Pair) -> tuple[Call, float | None]:
    if pair.problem is not None:
        raise PpclError(pair.problem)
    try:
        data = pair.read()
    except OSError as error:
        raise PpclError(f"cannot be read ({error.strerror or error})") from None
    return encoder.encode(data, pair.caption)
