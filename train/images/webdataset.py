"""WebDataset shards: plain tar archives, read where they lie. Nothing is extracted."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ppcl_fx.errors import PpclError
from ppcl_fx.io.reading import open_regular
from ppcl_fx.train.images.captions import PICTURES, TEXTS, Pair, caption_among, hidden, plain_name
from ppcl_fx.train.images.pictures import PICTURE_BYTES

HEADER_BYTES = 2**20
"""What describes one member may be this large."""
_AGAIN = "write the shard again with plain files under relative names"


def open_shard(path: Path, name: str) -> list[Pair]:
    """Return the pairs of a shard, in its order: files with one stem are one sample.

    A sample is ``STEM.jpg`` (or another ending of `PICTURES`) with ``STEM.txt``, or with ``STEM.json`` that holds the
    caption. A stem ends at its first dot, so ``STEM.1.0.jpg``, as the paper's shards have it, is a picture of STEM.

    Args:
        path: The shard.
        name: Of the shard, for messages.

    Raises:
        PpclError: The archive is damaged or compressed, or a member is a link, a device, or under a name that is
            absolute or leads upwards.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    twice: set[str] = set()
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                inner = _checked(path, member)
                if member.isdir() or hidden(inner):
                    continue
                stem, kind = _stem(inner)
                if kind.rpartition(".")[2] not in (*PICTURES, *TEXTS):
                    continue
                if kind in samples.setdefault(stem, {}):
                    twice.add(stem)
                samples[stem][kind] = member
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PpclError(f"{path}: not a whole uncompressed tar archive ({reason}); copy it again") from None
    return [_pair(path, f"{name}:{stem}", members, stem in twice) for stem, members in samples.items()]


class _Headers:
    """A shard's file as `tarfile` reads it for the headers: a damaged one cannot ask for gigabytes at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def _checked(path: Path, member: tarfile.TarInfo) -> str:
    """The name of a member that can be read, with the slashes of this system."""
    plain = plain_name(member.name)
    name = PurePosixPath(plain)
    if name.is_absolute() or ".." in name.parts or "\\" in plain or "\0" in plain:
        raise PpclError(f"{path}: the member {member.name!r} leaves the archive; {_AGAIN}")
    if member.size < 0 or member.issparse() or not (member.isreg() or member.isdir()):
        what = "a link" if member.issym() or member.islnk() else "no plain file"
        raise PpclError(f"{path}: the member {member.name!r} is {what}; {_AGAIN}")
    return plain


def _stem(name: str) -> tuple[str, str]:
    """A WebDataset name: the stem ends at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _pair(path: Path, name: str, members: dict[str, tarfile.TarInfo], twice: bool) -> Pair:
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
    caption, problem = caption_among({kind: partial(_read, path, member) for kind, member in members.items()})
    return Pair(name, caption, partial(_read, path, picture, PICTURE_BYTES), problem)


def _read(path: Path, member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise OSError(f"larger than {limit} bytes")
    with open_regular(path) as file:
        file.seek(member.offset_data)
        data = file.read(member.size)
    if len(data) != member.size:
        raise OSError("cut short")
    return data
