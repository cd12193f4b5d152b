"""WebDataset shards: plain tar archives, read where they lie. Nothing is extracted."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from ppcl_fx.errors import PpclError
from ppcl_fx.reading import open_regular
from ppcl_fx.train.sources.pairs import CAPTION_BYTES, IMAGE_BYTES, PICTURES, Pair, caption_in, hidden

_AGAIN = "write the shard again with plain files under relative names"


def open_tar(path: Path) -> list[Pair]:
    """Return the pairs of a shard, in its order: files with one stem are one sample.

    A sample is ``STEM.jpg`` (or jpeg, png, webp) with ``STEM.txt``, or with ``STEM.json`` that holds the caption. A
    stem ends at its first dot, so ``STEM.1.0.jpg``, as the paper's shards have it, is a picture of STEM.

    Raises:
        PpclError: The archive is damaged or compressed, or a member is a link, a device, or under a name that is
            absolute or leads upwards.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    twice: set[str] = set()
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check(path, member)
                if member.isdir() or hidden(member.name):
                    continue
                stem, _, kind = _stem(member.name)
                if kind in samples.setdefault(stem, {}):
                    twice.add(stem)
                samples[stem][kind] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise PpclError(f"{path}: not a whole uncompressed tar archive ({reason}); copy it again") from None
    return [_pair(path, stem, members, stem in twice) for stem, members in samples.items()]


def _check(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise PpclError(f"{path}: the member {member.name!r} leaves the archive; {_AGAIN}")
    if member.issparse() or not (member.isreg() or member.isdir()):
        what = "a link" if member.issym() or member.islnk() else "no plain file"
        raise PpclError(f"{path}: the member {member.name!r} is {what}; {_AGAIN}")


def _stem(name: str) -> tuple[str, str, str]:
    """A WebDataset name: the stem ends at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    return folder + slash + stem, dot, kind.lower()


def _pair(path: Path, stem: str, members: dict[str, tarfile.TarInfo], twice: bool) -> Pair:
    name = f"{path.name}:{stem}"
    pictures = [kind for kind in members if kind.rpartition(".")[2] in PICTURES]
    if twice:
        return Pair(name, problem="has two files of one kind")
    if not pictures:
        return Pair(name, problem=f"has no picture ({', '.join(PICTURES)})")
    # Of a.jpg and a.mask.png the first is the picture; of a.1.jpg and a.2.jpg nobody can tell.
    plain = [kind for kind in pictures if kind in PICTURES] or pictures
    if len(plain) > 1 and not set(plain) <= set(PICTURES):
        return Pair(name, problem=f"has several pictures ({', '.join(plain)})")
    picture = members[min(plain, key=lambda kind: PICTURES.index(kind.rpartition(".")[2]))]
    kind = next((kind for kind in ("txt", "json") if kind in members), None)
    if kind is None:
        return Pair(name, problem="has no caption (txt, json)")
    try:
        caption, problem = caption_in(kind, _read(path, members[kind], CAPTION_BYTES))
    except OSError:
        caption, problem = "", f"its caption ({kind}) cannot be read"
    return Pair(name, caption, lambda: _read(path, picture, IMAGE_BYTES), problem)


def _read(path: Path, member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise OSError(f"larger than {limit} bytes")
    with open_regular(path) as file:
        file.seek(member.offset_data)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError("cut short")
    return data
