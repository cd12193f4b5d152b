"""Checkpoints that all ranks write together, each its part, and that any number of ranks reads.

PyTorch's distributed checkpoints (DCP), in its safetensors format: nothing is pickled. Every tensor has the name and
the shape that it has in the checkpoint of a single process, so either kind goes on from the other. A rank's optimiser
numbers its own parameters; in a checkpoint they have the numbers that one process gives them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import inside, read_json, sha256_of, write_json
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.core.checkpoints import PIECES, LoadedCheckpoint, State
from ppcl_fx.train.core.optimizer import is_low
from ppcl_fx.train.core.stages import Stage
from ppcl_fx.train.distributed.consensus import FAULT, heard
from ppcl_fx.train.distributed.edit_parallel import EditParallel
from ppcl_fx.train.distributed.process_group import ProcessGroup, collective

FOLDER = "tensors"


class Piece(BaseModel):
    """One file: its bytes and their SHA-256."""

    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=0)
    sha256: str


class PartIndex(BaseModel):
    """What `pieces.json` holds: how many ranks wrote, and every file by name."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    ranks: int = Field(gt=0)
    numbers: list[str] = Field(default_factory=list, description="tensors without a dimension, stored as one of one")
    files: dict[str, Piece]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(piece.size for piece in self.files.values())


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: ProcessGroup) -> PartIndex | None:
    """Write this rank's tensors, and its parts of sharded ones, into `folder`; all ranks call it together.

    A name that is not sharded is given by one rank, or is the same on all that give it.

    Returns:
        The index, on rank 0, which has written it.

    Raises:
        PpclError: A rank is lost, or cannot write.
    """
    place = folder / FOLDER
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    # A number has no dimension to say where in it a piece lies.
    numbers = [name for name, tensor in plain.items() if tensor.ndim == 0]
    plain = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in plain.items()}
    with collective(), _checkpoint_errors(folder):
        save(plain, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
    mine = f"shard-{ranks.rank + 1:05d}-"
    fault, files = "", {}
    try:
        files = {p.name: _piece(p).model_dump() for p in place.iterdir() if p.name.startswith(mine)}
    except (OSError, PpclError) as error:
        fault = f"{place}: rank {ranks.rank} cannot read what it wrote ({error})"
    everyone = ranks.gather((fault, numbers, files))
    for fault, _, _ in everyone:
        if fault:
            raise PpclError(fault)
    if not ranks.first:
        return None
    index = PartIndex(
        ranks=ranks.world,
        numbers=sorted({name for _, names, _ in everyone for name in names}),
        files={name: Piece(**piece) for _, _, found in everyone for name, piece in found.items()},
    )
    write_json(folder / PIECES, index)
    return index


class DistributedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint that several ranks wrote, by name.

    As a mapping it gives them whole, on the CPU, and reads all of them when the first is asked for. `fill` reads no
    more than a rank needs.

    Args:
        folder: The checkpoint's folder.
        check: Whether to read every file once and compare its checksum.

    Raises:
        PpclError: A file is missing, truncated or was changed.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self.folder = folder
        index = read_json(inside(folder, PIECES), PartIndex)
        self._numbers = frozenset(index.numbers)
        for name, piece in index.files.items():
            _check(inside(folder / FOLDER, name), piece, check)
        try:
            found = self._reader().read_metadata().state_dict_metadata
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise PpclError(f"{folder / FOLDER}: cannot be read ({error})") from None
        self._shapes = {
            name: (entry.properties.dtype, entry.size)
            for name, entry in found.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def empty(self, name: str) -> Tensor:
        """Return an empty tensor of the dtype and shape of the one called `name`."""
        dtype, shape = self._shapes[name]
        return torch.empty(() if name in self._numbers else shape, dtype=dtype)

    def fill(self, targets: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Overwrite each target, a plain or a sharded tensor, with what is stored under its name.

        Args:
            targets: Name -> tensor; each rank has its own.
            alone: This process reads for itself; otherwise all ranks call this together.

        Raises:
            PpclError: A target has another shape than what is stored, or a rank is lost.
        """
        flat = {name: t.detach().reshape(1) if t.ndim == 0 else t.detach() for name, t in targets.items()}
        for name, target in flat.items():
            if name not in self._shapes or self._shapes[name][1] != target.shape:
                raise PpclError(f"{self.folder}: {name} is not in it, or of another shape")
        with collective(), _checkpoint_errors(self.folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `alone` means that
            load(flat, storage_reader=self._reader(), no_dist=alone)

    def __getitem__(self, name: str) -> Tensor:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @functools.cached_property
    def _all(self) -> dict[str, Tensor]:
        tensors = {name: self.empty(name) for name in self._shapes}
        self.fill(tensors, alone=True)
        return tensors

    def _reader(self) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(str(self.folder / FOLDER))


def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Overwrite each target, plain or sharded, with the stored tensor of its name; all ranks call it together."""
    if isinstance(tensors, DistributedTensors):
        tensors.fill(targets)
        return
    with torch.no_grad():
        for name, target in targets.items():
            whole = tensors[name].reshape(target.shape)
            if isinstance(target, DTensor):
                # Each rank has the whole one at hand and takes its own part: nothing is sent.
                whole = distribute_tensor(
                    whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
            target.copy_(whole)


def like(name: str, tensors: Mapping[str, Tensor], parameter: Tensor | None) -> Tensor:
    """Return an empty tensor for what is stored under `name`: sharded as `parameter` is, where it has its shape."""
    stored = tensors.empty(name) if isinstance(tensors, DistributedTensors) else tensors[name]
    if isinstance(parameter, DTensor) and parameter.shape == stored.shape:
        return torch.zeros_like(parameter, dtype=stored.dtype)
    return torch.empty_like(stored, device="cpu")


def _piece(path: Path) -> Piece:
    return Piece(size=path.stat().st_size, sha256=sha256_of(path))


def _check(path: Path, piece: Piece, thoroughly: bool) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != piece.size:
        raise PpclError(f"{path}: truncated, {size} bytes of {piece.size}")
    if thoroughly and _piece(path).sha256 != piece.sha256:
        raise PpclError(f"{path}: was changed after it was written")


class _checkpoint_errors:
    """Turns DCP's report of what failed on which rank into one line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointException):
            rank, failure = next(iter(error.failures.items()))
            reason = " ".join(str(failure[0]).split())[:200]
            raise PpclError(f"{self._folder}: checkpoint failed on rank {rank} ({reason})") from error


class DistributedCheckpoints:
    """Checkpoints of one stage that all ranks write and read together.

    Args:
        ranks: This process among the others.
        stage: The stage.
        students: The pluggable model's students, state-dict name -> parameter.
    """

    def __init__(self, ranks: ProcessGroup, stage: Stage, students: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        # Sharded parameters are everyone's; of the students of a stage each is one rank's.
        whole = stage.whole if isinstance(stage, EditParallel) else stage.groups
        owners = stage.owners if isinstance(stage, EditParallel) else {}
        mine = [p for parameters in stage.groups.values() for p in parameters]
        everyones = [p for parameters in whole.values() for p in parameters]
        self._groups = {edit: list(parameters) for edit, parameters in stage.groups.items()}
        self._numbers = _numbers(mine, everyones)
        self._mine, self._low = mine, [p for p in mine if is_low(p)]
        self._lows = _numbers(self._low, [p for p in everyones if is_low(p)])
        self._own = stage.tensors()
        owner = {id(p): owners[edit] for edit, parameters in whole.items() if edit in owners for p in parameters}
        # A student that no rank trains now is the same on all; rank 0 writes it.
        self._written = {name for name, p in students.items() if owner.get(id(p), 0) == ranks.rank}

    def save(self, folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Do what `checkpoints.save` does, all ranks together; rank 0 writes what is written once.

        Raises:
            PpclError: A rank cannot write or is lost. All ranks raise it, and the checkpoints before are whole.
        """
        mine = dict(self._everyones(tensors))
        if not self._ranks.first:
            write(Path(heard(self._ranks)), mine, self._ranks)
            heard(self._ranks)
            return
        waiting = True  # whether the others wait for a word of this rank

        def put(beside: Path, _: Mapping[str, Tensor]) -> str:
            nonlocal waiting
            waiting = False
            self._ranks.words(str(beside))
            write(beside, mine, self._ranks)
            waiting = True
            return PIECES

        try:
            checkpoints.save(folder, state, tensors, put=put)
        except PpclError as error:
            if waiting:
                self._ranks.words(f"{FAULT}{error}")
            raise
        self._ranks.words("")

    def local(self, start: LoadedCheckpoint) -> LoadedCheckpoint:
        """Return a checkpoint with this rank's tensors under this rank's names, the students left out."""
        targets: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for name in start.tensors:
            found = self._place(name)
            if found is not None:
                names[found[0]] = name
                targets[name] = like(name, start.tensors, found[1])
        fill(targets, start.tensors)
        return replace(start, tensors={mine: targets[name] for mine, name in names.items()})

    def _place(self, name: str) -> tuple[str, Tensor | None] | None:
        """Return a stored tensor's name on this rank and the parameter it belongs to, None where it is not ours."""
        kind, _, rest = name.partition(".")
        if kind == "rng":
            return name, None
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            mine = self._numbers.get(int(number))
            return None if mine is None else (f"optimizer.{mine}.{key}", self._mine[mine])
        if kind == "master":
            low = self._lows.get(int(rest))
            return None if low is None else (f"master.{low}", self._low[low])
        if kind == "average":
            edit, index = (int(part) for part in rest.split("."))
            group = list(self._groups.values())[edit]
            return (name, group[index]) if index < len(group) else None
        if kind == "students":
            return None
        own = self._own.get(name)
        return None if own is None else (name, own)

    def _everyones(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes, by the names of one process."""
        numbers = {mine: number for number, mine in self._numbers.items()}
        lows = {mine: number for number, mine in self._lows.items()}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, key = rest.partition(".")
                yield f"optimizer.{numbers[int(number)]}.{key}", tensor
            elif kind == "master":
                yield f"master.{lows[int(rest)]}", tensor
            elif kind == "students":
                if rest in self._written:
                    yield name, tensor
            elif kind != "rng" or self._ranks.first:
                yield name, tensor


def students_of(start: LoadedCheckpoint, students: Mapping[str, Tensor]) -> LoadedCheckpoint:
    """Return a checkpoint with the tensors of the students alone, read by this rank and whole."""
    names = [f"students.{name}" for name in students]
    if not isinstance(start.tensors, DistributedTensors):
        return start
    targets = {name: start.tensors.empty(name) for name in names}
    start.tensors.fill(targets, alone=True)
    return replace(start, tensors=targets)


def _numbers(mine: list[Parameter], everyones: list[Parameter]) -> dict[int, int]:
    """Return a parameter's number on one process -> its number here."""
    place = {id(p): number for number, p in enumerate(everyones)}
    return {place[id(p)]: number for number, p in enumerate(mine)}
