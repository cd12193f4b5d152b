"""The run store: results of a calibration, in memory, or in a folder, from which a killed one goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import inside, need_room, read_json, read_safetensors, write_json, write_safetensors
from ppcl_fx.passes.calibration.reservoir import Sample

PROGRESS = "progress.json"

MEMORY = 4 * 2**30
"""Bytes of activations kept at most."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """What an analysis is of: a run goes on from another's results only where all of this is the same."""

    samples: int
    memory: int
    ridge: float
    refine_steps: int
    version: Literal[2] = 2
    model: str
    calls: str
    dtype: str


class Done(_Record):
    """How far an analysis has come: `cut` segments are done, and the calls' values after them are in files."""

    identity: Identity
    cut: int


class KeptResult(_Record):
    """The activations kept of one node: ``[tokens, width]`` for each sample, one after the other in a file."""

    dtype: str
    width: int
    samples: list[tuple[int, int, int]]
    """Call, row and tokens of each."""


class Note(_Record):
    """The bytes that the samples of a call take in one stream (`Reservoir.note`)."""

    call: int
    batch: int
    nbytes: int


class CalibrationResult(_Record):
    """What one sweep gave, by the names of probes and shelves, and the positions of feed-forwards.

    energies are of the states that probes imitate; few is what to say of the tokens that they were solved from; ffn
    holds error and cosine; notes are the sizes that the sweep made known.
    """

    fits: dict[str, float] = {}
    energies: dict[str, float] = {}
    few: dict[str, str] = {}
    ffn: dict[int, tuple[float, float]] = {}
    shelves: dict[str, KeptResult] = {}
    notes: list[Note] = []


class RunStore:
    """The results of a calibration, in a folder, made if it is not there, or in memory.

    Attributes:
        cut: segments that were done when the store was opened.
        found: the results of all sweeps so far.

    Raises:
        PpclError: the folder holds the results of another analysis, or they are damaged.
    """

    def __init__(self, folder: Path | None = None, identity: Identity | None = None) -> None:
        self.folder = folder
        self.cut = self._added = 0
        self.found = CalibrationResult()
        self._identity = identity
        self._probes: dict[str, Path | Tensor] = {}
        self._shelves: dict[str, Shelf] = {}
        if folder is None or identity is None:
            return
        if (folder / PROGRESS).is_file():
            done = read_json(inside(folder, PROGRESS), Done)
            for name, mine in identity.model_dump().items():
                theirs = getattr(done.identity, name)
                if theirs != mine:
                    raise PpclError(
                        f"{folder}: holds an unfinished analysis of another {name} ({theirs}, here {mine}); "
                        "give the same again to go on with it, or remove the folder"
                    )
            for number in range(done.cut):
                self._note(read_json(folder / "results" / f"{number:04d}.json", CalibrationResult))
            self.cut = done.cut
        for part in ("results", "probes", "kept", "curves"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def add(self, found: CalibrationResult, probes: Mapping[str, Tensor]) -> None:
        """Keep what the next sweep gave, the solved probes among it."""
        self._probes.update(probes)
        if self.folder is not None:
            name = f"{self._added:04d}"
            if probes:
                write_safetensors(self.folder / "probes" / f"{name}.safetensors", dict(probes))
            write_json(self.folder / "results" / f"{name}.json", found)
        self._note(found)

    def _note(self, found: CalibrationResult) -> None:
        if self.folder is not None:
            self._probes.update(dict.fromkeys(found.fits, self.folder / "probes" / f"{self._added:04d}.safetensors"))
        for name in ("fits", "energies", "few", "ffn", "shelves"):
            getattr(self.found, name).update(getattr(found, name))
        self.found.notes.extend(found.notes)
        self._added += 1

    def finish(self, cut: int) -> None:
        """Note that `cut` segments are done, and the calls' values after them written."""
        assert self.folder is not None and self._identity is not None
        write_json(self.folder / PROGRESS, Done(identity=self._identity, cut=cut))

    def probe(self, name: str) -> Tensor:
        """Return the weight of a solved probe; from a folder memory-mapped."""
        kept = self._probes[name]
        return read_safetensors(kept)[name] if isinstance(kept, Path) else kept

    def shelf(self, name: str) -> Shelf:
        """Return what the samples of one node are kept on."""
        path = None if self.folder is None else inside(self.folder / "kept", f"{name}.bin")
        return self._shelves.setdefault(name, Shelf(path))

    def kept(self, name: str) -> dict[Sample, Tensor]:
        """Return the samples of one node, ``[tokens, width]`` each, from a folder memory-mapped."""
        return self.shelf(name).read(self.found.shelves[name])

    def load_curves(self, stream: str, tensors: Mapping[str, Tensor]) -> int:
        """Copy the sums of a stream's curves into `tensors`; return how many batches they are of."""
        if self.folder is None or not (path := self.folder / "curves" / f"{stream}.safetensors").is_file():
            return 0
        stored = read_safetensors(path)
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
        return int(stored["batches"])

    def save_curves(self, stream: str, tensors: Mapping[str, Tensor], batches: int) -> None:
        """Write what `load_curves` reads."""
        if self.folder is not None:
            path = self.folder / "curves" / f"{stream}.safetensors"
            write_safetensors(path, {**tensors, "batches": torch.tensor(batches)})


class Shelf:
    """The samples kept of one node: in memory, or one after the other in a file, which is open in one sweep alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._held: dict[Sample, Tensor] = {}
        self._file: BinaryIO | None = None
        self._samples: list[tuple[int, int, int]] = []
        self._dtype, self._width = torch.float32, 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Start empty, and close the file in the end."""
        self._held, self._samples = {}, []
        with nullcontext() if self._path is None else self._path.open("wb") as self._file:
            yield
        self._file = None

    def add(self, sample: Sample, state: Tensor) -> None:
        """Keep a sample's state, ``[tokens, width]``."""
        self._dtype, self._width = state.dtype, state.shape[-1]
        self._samples.append((*sample, len(state)))
        if self._path is None or self._file is None:
            self._held[sample] = state.to("cpu", copy=True)
            return
        plain = state.detach().cpu().contiguous()
        need_room(self._path, plain.nbytes)
        self._file.write(plain.view(torch.uint8).numpy().data)

    def drop(self, sample: Sample) -> None:
        """Forget a sample that memory holds."""
        self._held.pop(sample, None)

    def content(self) -> KeptResult:
        """Flush to disk, and say what is kept."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        dtype = str(self._dtype).removeprefix("torch.")
        return KeptResult(dtype=dtype, width=self._width, samples=self._samples)

    def read(self, kept: KeptResult) -> dict[Sample, Tensor]:
        """Return the samples."""
        if self._path is None:
            return self._held
        dtype = getattr(torch, kept.dtype)
        total = sum(tokens for _, _, tokens in kept.samples) * kept.width
        if self._path.stat().st_size < total * dtype.itemsize:
            raise PpclError(f"{self._path}: truncated; remove {self._path.parent.parent} and analyse again")
        if not total:
            return {}
        whole = torch.from_file(str(self._path), shared=False, size=total, dtype=dtype).view(-1, kept.width)
        parts = whole.split([tokens for _, _, tokens in kept.samples])
        return {(call, row): part for (call, row, _), part in zip(kept.samples, parts, strict=True)}
