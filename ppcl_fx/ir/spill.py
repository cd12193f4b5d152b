"""Spill: what each call holds between two segments, in memory as far as a budget goes, the rest in files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ppcl_fx.io.files import need_room
from ppcl_fx.ir.tensor_codec import Encoded, decode, encode


class Spill:
    """Keeps the values of every call at the cut that a run has come to, and hands them out on a device.

    Args:
        folder: where files go; made when the first is written.
        budget: bytes that may be held in memory.
        device: where values are wanted.
    """

    def __init__(self, folder: Path, budget: int, device: torch.device) -> None:
        self.folder = folder
        self.budget = budget
        self.device = device
        self.peak = 0
        """Most bytes that one cut took, in memory and in files."""
        self.held_bytes = 0
        """Bytes in memory now."""
        self._held: dict[tuple[int, int | str], Encoded] = {}
        self._at_cut: dict[int, int] = {}

    def put(self, cut: int, call: int | str, values: Any) -> None:
        """Keep a call's values at a cut; raises `PpclError` where they go to disk, and the disk is full."""
        encoded = encode(values)
        size = encoded.nbytes
        self._at_cut[cut] = self._at_cut.get(cut, 0) + size
        self.peak = max(self.peak, self._at_cut[cut])
        if self.held_bytes + size <= self.budget:
            self._held[cut, call] = encoded
            self.held_bytes += size
        else:
            self._write(cut, call, encoded)

    def take(self, cut: int, call: int | str) -> Any:
        """Return a call's values at a cut. Those in memory are handed over: they can be taken once."""
        encoded = self._held.pop((cut, call), None)
        if encoded is not None:
            self.held_bytes -= encoded.nbytes
        else:
            encoded = Encoded.read(self._path(cut, call))
        return decode(encoded, self.device)

    def spilled(self, cut: int) -> bool:
        """Tell whether any call's values at a cut are in a file."""
        return (self.folder / f"{cut:04d}").is_dir()

    def flush(self, cut: int) -> None:
        """Write what memory holds of a cut to files too, so that a killed run can go on from there."""
        for (at, call), encoded in self._held.items():
            if at == cut and not self._path(cut, call).exists():
                self._write(cut, call, encoded)

    def forget_all_but(self, cut: int) -> None:
        """Remove the files of all other cuts."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name != f"{cut:04d}":
                    shutil.rmtree(path)

    def _write(self, cut: int, call: int | str, encoded: Encoded, /) -> None:
        path = self._path(cut, call)
        path.parent.mkdir(parents=True, exist_ok=True)
        need_room(path.parent, sum(len(piece) for piece in encoded.memory))
        encoded.write(path)

    def _path(self, cut: int, call: int | str, /) -> Path:
        return self.folder / f"{cut:04d}" / f"{call:06d}.safetensors"
