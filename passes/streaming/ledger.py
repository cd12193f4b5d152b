"""The folder in which a streamed analysis keeps its results block by block, and from which a killed one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ppcl_fx.errors import PpclError
from ppcl_fx.files import inside, read_json, read_safetensors, write_json, write_safetensors
from ppcl_fx.passes.probes import Fit, Projector

PROGRESS = "progress.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """What an analysis is of: a run goes on from another's results only where all of this is the same."""

    version: Literal[2] = 2
    model: str
    calls: str
    dtype: str
    samples: int
    memory: int
    ridge: float
    refine_steps: int


class Done(_Record):
    """How far an analysis has come: `cut` segments are done, and the calls' values after them are in files."""

    identity: Identity
    cut: int


class Shelf(_Record):
    """The activations kept of one node: ``[tokens, width]`` for each sample, one after the other in a file.

    samples: call, row and tokens of each.
    """

    dtype: str
    width: int
    samples: list[tuple[int, int, int]]


class Note(_Record):
    """The bytes that the samples of a call take in one stream (`Choice.note`)."""

    call: int
    batch: int
    nbytes: int


class BlockResult(_Record):
    """What one segment gave.

    fits: error of each probe, by the probe's name. energies: of the states that probes imitate, and few: what to say of
    the tokens that they were solved from, by the same name.
    ffn: error and cosine of each feed-forward, by its position. shelves: what was kept, by the shelf's name.
    notes: sizes that the segment made known.
    """

    fits: dict[str, float]
    energies: dict[str, float]
    few: dict[str, str]
    ffn: dict[int, tuple[float, float]]
    shelves: dict[str, Shelf]
    notes: list[Note]


class Ledger:
    """The results on disk.

    Args:
        folder: made if it is not there.
        identity: of this analysis.

    Attributes:
        cut: segments that were done when the ledger was opened.

    Raises:
        PpclError: the folder holds the results of another analysis, or they are damaged.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        self.identity = identity
        self.cut = 0
        self.results: list[BlockResult] = []
        if (folder / PROGRESS).is_file():
            done = read_json(inside(folder, PROGRESS), Done)
            for name, mine in identity.model_dump().items():
                theirs = getattr(done.identity, name)
                if theirs != mine:
                    raise PpclError(
                        f"{folder}: holds an unfinished analysis of another {name} ({theirs}, here {mine}); "
                        "give the same again to go on with it, or remove the folder"
                    )
            self.cut = done.cut
            self.results = [read_json(self._result(number), BlockResult) for number in range(done.cut)]
        for part in ("results", "probes", "kept", "curves"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def add(self, result: BlockResult, probes: dict[str, Projector]) -> None:
        """Write what the next segment gave."""
        number = len(self.results)
        if probes:
            write_safetensors(self._probes(number), {name: probe.weight for name, probe in probes.items()})
        write_json(self._result(number), result)
        self.results.append(result)

    def finish(self, cut: int) -> None:
        """Note that `cut` segments are done, and the calls' values after them written."""
        write_json(self.folder / PROGRESS, Done(identity=self.identity, cut=cut))

    def probe(self, name: str) -> Projector:
        """Return a probe, memory-mapped."""
        for number, result in enumerate(self.results):
            if name in result.fits:
                return Projector(read_safetensors(self._probes(number))[name])
        raise RuntimeError(f"no probe {name}")

    def fit(self, name: str) -> float:
        """Return a probe's relative error."""
        return next(result.fits[name] for result in self.results if name in result.fits)

    def energy(self, name: str) -> float:
        """Return the mean squared length of a token of the state that a probe imitates."""
        return next(result.energies[name] for result in self.results if name in result.energies)

    def few(self, name: str) -> str:
        """Return what to say of the tokens that a probe was solved from."""
        return next(result.few[name] for result in self.results if name in result.few)

    def ffn(self, position: int) -> Fit:
        """Return how well a feed-forward is fitted."""
        return Fit(*next(result.ffn[position] for result in self.results if position in result.ffn))

    def shelf(self, name: str) -> Shelf:
        """Return what is on a shelf."""
        return next(result.shelves[name] for result in self.results if name in result.shelves)

    def shelf_path(self, name: str) -> Path:
        """Return the file of a shelf."""
        return inside(self.folder / "kept", f"{name}.bin")

    def curve_path(self, name: str) -> Path:
        """Return the file of a stream's curves."""
        return inside(self.folder / "curves", f"{name}.safetensors")

    def _result(self, number: int) -> Path:
        return self.folder / "results" / f"{number:04d}.json"

    def _probes(self, number: int) -> Path:
        return self.folder / "probes" / f"{number:04d}.safetensors"


def read_shelf(path: Path, shelf: Shelf) -> dict[tuple[int, int], torch.Tensor]:
    """Return the activations on a shelf by call and row, ``[tokens, width]`` each, memory-mapped."""
    dtype = getattr(torch, shelf.dtype)
    total = sum(tokens for _, _, tokens in shelf.samples) * shelf.width
    if path.stat().st_size < total * dtype.itemsize:
        raise PpclError(f"{path}: truncated; remove {path.parent.parent} and analyse again")
    whole = (
        torch.from_file(str(path), shared=False, size=total, dtype=dtype)
        if total
        else torch.empty(0, dtype=dtype)
    )
    found, at = {}, 0
    for call, row, tokens in shelf.samples:
        found[call, row] = whole[at : at + tokens * shelf.width].view(tokens, shelf.width)
        at += tokens * shelf.width
    return found
