"""The teacher's values at the borders of the students, by call: in memory up to a budget, then in checked files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import need_room, read_json, sha256_of, write_json
from ppcl_fx.io.memory import size_words
from ppcl_fx.ir.tensor_codec import Encoded, decode, encode

INDEX = "cache.json"
_log = logging.getLogger("ppcl_fx.train")


class Damaged(Exception):
    """A cached value is not there, or is not what was written."""


class _Index(BaseModel):
    """What a cache is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str


class Cache:
    """Values by call and bundle; a bundle is a list of values that are needed together.

    Files outlive the process: a run that was killed finds again what was written. Each has a checksum beside it, which
    is compared whenever the file is read.

    Args:
        folder: where files go; what another key left there is removed.
        key: digest of what decides the values.
        memory: bytes to hold in memory.
        disk: bytes that files may take.
        device: where values are wanted.
    """

    def __init__(self, folder: Path, key: str, memory: int, disk: int, device: torch.device) -> None:
        self.folder = folder
        self._memory, self._disk, self._device = memory, disk, device
        self._held: dict[tuple[int, str], Encoded] = {}
        self.held_bytes = 0
        """Bytes in memory."""
        if not _same(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / INDEX, _Index(key=key))
        self.file_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        """Bytes in files."""

    def has(self, call: int, bundle: str) -> bool:
        """Tell whether a call's bundle was put in; a file is not looked into."""
        return (call, bundle) in self._held or self._sum(call, bundle).is_file()

    def put(self, call: int, bundle: str, values: Any) -> None:
        """Keep a call's bundle.

        Raises:
            PpclError: there is no room for it, within the budget or on the disk.
        """
        encoded = encode(values)
        size = encoded.nbytes
        if self.held_bytes + size <= self._memory:
            self._held[call, bundle] = encoded
            self.held_bytes += size
            return
        size = sum(len(piece) for piece in encoded.memory)
        if self.file_bytes + size > self._disk:
            raise PpclError(
                f"{self.folder}: the cache needs more than the {size_words(self._disk)} it was given; "
                "give a larger --disk-limit"
            )
        path = self._path(call, bundle)
        path.parent.mkdir(exist_ok=True)
        need_room(self.folder, size)
        encoded.write(path)
        # The checksum last: a file without one does not count.
        write_json(self._sum(call, bundle), {"sha256": sha256_of(path)})
        self.file_bytes += path.stat().st_size

    def get(self, call: int, bundle: str) -> Any:
        """Return a call's bundle, its tensors on the device.

        Raises:
            Damaged: it is not there, or not what was written.
        """
        encoded = self._held.get((call, bundle))
        return decode(encoded if encoded is not None else self._read(call, bundle), self._device)

    def drop(self, call: int) -> None:
        """Forget a call's bundles."""
        for key in [key for key in self._held if key[0] == call]:
            self.held_bytes -= self._held.pop(key).nbytes
        place = self.folder / f"{call:06d}"
        if place.is_dir():
            self.file_bytes -= sum(path.stat().st_size for path in place.glob("*.safetensors"))
            shutil.rmtree(place)

    def keep_only(self, calls: Collection[int]) -> None:
        """Forget all calls but these."""
        filed = {int(path.name) for path in self.folder.iterdir() if path.is_dir()}
        for call in (filed | {call for call, _ in self._held}) - set(calls):
            self.drop(call)

    def _read(self, call: int, bundle: str) -> Encoded:
        path = self._path(call, bundle)
        try:
            expected = read_json(self._sum(call, bundle), _Sum).sha256
            if sha256_of(path) != expected:
                raise Damaged(f"{path}: its checksum is another than when it was written")
            return Encoded.read(path)
        except (PpclError, OSError, SafetensorError) as error:
            raise Damaged(str(error)) from error

    def _path(self, call: int, bundle: str) -> Path:
        return self.folder / f"{call:06d}" / f"{bundle}.safetensors"

    def _sum(self, call: int, bundle: str) -> Path:
        return self.folder / f"{call:06d}" / f"{bundle}.json"


class _Sum(BaseModel):
    """The checksum of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str


def _same(folder: Path, key: str) -> bool:
    if not (folder / INDEX).is_file():
        return False
    try:
        return read_json(folder / INDEX, _Index).key == key
    except PpclError as error:
        _log.warning("the cache is made again: %s", error)
        return False
