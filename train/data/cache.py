"""The cache of encoded pictures: parts of calls with clean latents, each written once and named by what is in it.

``CACHE/<pipeline>/template.json`` says how the pipeline's calls are made, ``CACHE/<pipeline>/<part>/`` holds up to 64
calls and what is known of them. Its name is their pictures' and captions' hash, so what changed is encoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, inside, new_folder, read_json, write_json
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.train.core.batches import signature
from ppcl_fx.train.data.source import BadSamples
from ppcl_fx.train.data.template import Template, Unsupported, tensors_of
from ppcl_fx.train.distributed.process_group import ALONE, ProcessGroup, wait_for
from ppcl_fx.train.images.captions import Pair
from ppcl_fx.train.images.encode import Encoder

PART = 64  # pictures of one part: what a kill may cost
CALLS, CARD, TEMPLATE = "calls", "samples.json", "template.json"
_log = logging.getLogger("ppcl_fx.train")


class CacheManifest(Record):
    """What is known of a part without its tensors, in the order of its calls."""

    version: Literal[1] = 1
    names: list[str]
    digests: list[str]  # of the tensors of each sample
    groups: list[str]  # hash of what samples must share to come into one batch
    mu: list[float | None]  # the scheduler's shift at each sample's size; None where it is static
    skipped: dict[str, str]  # what is wrong with the corrupt samples, by name


class Part(NamedTuple):
    """A part of the cache that can be read."""

    folder: Path
    card: CacheManifest


class Pairs(NamedTuple):
    """Pictures and captions that are encoded into one part, and the part's name in the cache."""

    name: str
    pairs: Sequence[Pair]


def cut(pairs: Sequence[Pair], ranks: ProcessGroup = ALONE) -> list[Pairs]:
    """Return the parts of a data set; reads every picture's file, for the parts' names, each rank its share."""
    parts = [pairs[i : i + PART] for i in range(0, len(pairs), PART)]
    names = ranks.gather([_name(part) for part in parts[ranks.rank :: ranks.world]])
    return [Pairs(names[i % ranks.world][i // ranks.world], part) for i, part in enumerate(parts)]


def encode(
    encoder: Encoder,
    parts: Sequence[Pairs],
    cache: str | Path,
    *,
    ranks: ProcessGroup = ALONE,
    skips: BadSamples | None = None,
    progress: Callable[[int, int], None] | None = None,  # called with the pictures that are done and all of them
) -> Path:
    """Encode all pictures that the cache does not hold yet, the ranks in turns, a part each; return the pipeline's
    folder in it.

    A kill costs the parts that were being encoded, one a rank. A damaged part is encoded again; those of other data
    stay. Raises PpclError, the same on every rank, where more than 1 % of the pictures are corrupt, or the pipeline is
    not supported.
    """
    folder = Path(cache) / encoder.key[:32]
    total = sum(len(part.pairs) for part in parts)
    skips = skips or BadSamples("the pictures", total, ranks)
    place = folder / TEMPLATE
    known = ranks.each(lambda: read_json(inside(folder, TEMPLATE), Template) if place.is_file() else None)
    encoder.template = encoder.template or known
    # Each rank looks for its share of what is missing, and all know the same.
    mine = [part.name for part in parts[ranks.rank :: ranks.world] if _find(folder / part.name) is None]
    wanted = {name for names in ranks.gather(mine) for name in names}
    missing = list({part.name: part for part in parts if part.name in wanted}.values())
    done = total - sum(len(part.pairs) for part in missing)
    # In turns, so that no rank waits longer for the others than for one part, and all stop at once.
    for first in range(0, len(missing), ranks.world):
        turn = missing[first : first + ranks.world]
        ranks.each(partial(_encode, encoder, turn[ranks.rank : ranks.rank + 1], folder, skips))
        skips.agree()
        done += sum(len(part.pairs) for part in turn)
        if progress is not None:
            progress(done, total)
    return folder


def find_parts(folder: Path, parts: Sequence[Pairs], ranks: ProcessGroup = ALONE) -> list[Part]:
    """Return the cached parts, in the order of `parts`, from the pipeline's folder, once this rank sees them.

    Raises PpclError where a part is missing or damaged.
    """
    found = []
    for part in parts:
        place = folder / part.name
        wait_for(place, ranks)
        cached = _find(place)
        if cached is None:
            name = part.pairs[0].name
            raise PpclError(f"{place}: {name} and what follows is not encoded; encode the pictures first")
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
        card = read_json(inside(place, CARD), CacheManifest)
        calls = Calls.open(place / CALLS, check=False) if card.names else []
        if {len(card.names)} != {len(calls), len(card.digests), len(card.groups), len(card.mu)}:
            raise PpclError(f"{place}: its card does not fit its calls")
    except PpclError as error:
        _log.warning("%s; that part is encoded again", error)
        return None
    return Part(place, card)


def _encode(encoder: Encoder, parts: Sequence[Pairs], folder: Path, skips: BadSamples) -> None:
    """Encode a rank's part of a turn, or none."""
    for part in parts:
        calls: list[Call] = []
        card = CacheManifest(names=[], digests=[], groups=[], mu=[], skipped={})
        for pair in part.pairs:
            try:
                if pair.problem is not None:
                    raise PpclError(pair.problem)
                call, mu = encoder.encode(_read(pair), pair.caption)
            except Unsupported:
                raise
            except PpclError as error:
                card.skipped[pair.name] = str(error)
                skips.meet(pair.name, str(error))
                continue
            calls.append(replace(call, index=len(calls)))
            card.names.append(pair.name)
            card.digests.append(sample_digest(call))
            card.groups.append(group_digest(call))
            card.mu.append(mu)
        with new_folder(folder / part.name, replaces=owned.ENCODED_PART) as new:
            if calls:
                Calls(calls).save(new / CALLS)
            write_json(new / CARD, card)
        if encoder.template is not None and not (folder / TEMPLATE).is_file():
            write_json(folder / TEMPLATE, encoder.template)


def _read(pair: Pair) -> bytes:
    try:
        return pair.read()
    except OSError as error:
        raise PpclError(f"cannot be read ({error.strerror or error})") from None
