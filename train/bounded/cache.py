"""The teacher's values at the borders of the students, by call: in memory up to a budget, then in checked files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import Record, read_json, sha256_of, write_json
from ppcl_fx.io.memory import size_words
from ppcl_fx.ir.spill import Spill
from ppcl_fx.ir.tensor_codec import Encoded, decode

INDEX = "cache.json"
_log = logging.getLogger("ppcl_fx.train")


class Damaged(Exception):
    """A cached value is not there, or is not what was written."""


class _Index(Record):
    key: str


class _Sum(Record):
    sha256: str


class Cache(Spill):
    """A spill by call and bundle (values that are needed together), whose files outlive the process.

    Each file has a checksum beside it, which is compared whenever the file is read. The `key` is a digest of what
    decides the values: what another one left in the folder is removed. `memory` and `disk` are bytes to hold there.
    """

    def __init__(self, folder: Path, key: str, memory: int, disk: int, device: torch.device) -> None:
        super().__init__(folder, memory, device)
        self._disk = disk
        if not _same(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / INDEX, _Index(key=key))
        self.file_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        """Bytes in files."""

    def has(self, call: int, bundle: str) -> bool:
        """Tell whether a call's bundle was put in; a file is not looked into."""
        return (call, bundle) in self._held or self._path(call, bundle).with_suffix(".json").is_file()

    def get(self, call: int, bundle: str) -> Any:
        """Return a call's bundle, its tensors on the device. Raises Damaged where it is not there, or not what was
        written.
        """
        encoded = self._held.get((call, bundle))
        return decode(encoded if encoded is not None else self._read(self._path(call, bundle)), self.device)

    def drop(self, call: int) -> None:
        """Forget a call's bundles."""
        for key in [key for key in self._held if key[0] == call]:
            self.held_bytes -= self._held.pop(key).nbytes
        place = self._path(call, "").parent
        if place.is_dir():
            self.file_bytes -= sum(path.stat().st_size for path in place.glob("*.safetensors"))
            shutil.rmtree(place)

    def keep_only(self, calls: Collection[int]) -> None:
        """Forget all calls but these."""
        filed = {int(path.name) for path in self.folder.iterdir() if path.is_dir()}
        for call in (filed | {call for call, _ in self._held}) - set(calls):
            self.drop(call)

    def _write(self, call: int, bundle: int | str, encoded: Encoded, /) -> None:
        if self.file_bytes + sum(len(piece) for piece in encoded.memory) > self._disk:
            raise PpclError(
                f"{self.folder}: the cache needs more than the {size_words(self._disk)} it was given; "
                "give a larger --disk-limit"
            )
        super()._write(call, bundle, encoded)
        path = self._path(call, bundle)
        # The checksum last: a file without one does not count.
        write_json(path.with_suffix(".json"), _Sum(sha256=sha256_of(path)))
        self.file_bytes += path.stat().st_size

    def _read(self, path: Path) -> Encoded:
        try:
            if sha256_of(path) != read_json(path.with_suffix(".json"), _Sum).sha256:
                raise Damaged(f"{path}: its checksum is another than when it was written")
            return Encoded.read(path)
        except (PpclError, OSError, SafetensorError) as error:
            raise Damaged(str(error)) from error

    def _path(self, call: int, bundle: int | str, /) -> Path:
        return self.folder / f"{call:06d}" / f"{bundle}.safetensors"


def _same(folder: Path, key: str) -> bool:
    if not (folder / INDEX).is_file():
        return False
    try:
        return read_json(folder / INDEX, _Index).key == key
    except PpclError as error:
        _log.warning("the cache is made again: %s", error)
        return False
