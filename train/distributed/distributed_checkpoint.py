"""Checkpoints that all ranks write together, each its part, and that any number of ranks reads.

PyTorch's distributed checkpoints (DCP), as safetensors. Every tensor has the name, number and shape that it has in the
checkpoint of a single process, so either kind goes on from the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import Record, inside, read_json, sha256_of, write_json
from ppcl_fx.train.core.checkpoints import PIECES, LoadedCheckpoint, State, writing
from ppcl_fx.train.core.optimizer import is_low
from ppcl_fx.train.core.stages import Stage
from ppcl_fx.train.distributed.edit_parallel import EditParallel
from ppcl_fx.train.distributed.process_group import ProcessGroup, collective

FOLDER = "tensors"


class Piece(Record):
    """One file: its bytes and their SHA-256."""

    size: int = Field(ge=0)
    sha256: str


class PartIndex(Record):
    """What `pieces.json` holds: how many ranks wrote, and every file by name."""

    version: Literal[1] = 1
    ranks: int = Field(gt=0)
    numbers: list[str] = Field(default_factory=list, description="tensors without a dimension, stored as one of one")
    files: dict[str, Piece]


def write(folder: Path, tensors: Mapping[str, Tensor], ranks: ProcessGroup) -> None:
    """Write this rank's tensors, and its parts of sharded ones, into `folder`; all ranks call it together.

    A name that is not sharded is given by one rank, or is the same on all that give it. Rank 0 writes the index.
    Raises PpclError where a rank is lost, or cannot write.
    """
    place = folder / FOLDER
    # A number has no dimension to say where in it a piece lies.
    numbers = [name for name, tensor in tensors.items() if tensor.ndim == 0]
    with collective(), _checkpoint_errors(folder):
        save(_flat(tensors), storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))

    def pieces() -> dict[str, Piece]:
        try:
            mine = place.glob(f"shard-{ranks.rank + 1:05d}-*")
            return {path.name: Piece(size=path.stat().st_size, sha256=sha256_of(path)) for path in mine}
        except (OSError, PpclError) as error:
            raise PpclError(f"{place}: rank {ranks.rank} cannot read what it wrote ({error})") from None

    everyone = ranks.gather((numbers, ranks.each(pieces)))
    if ranks.first:
        names = sorted({name for found, _ in everyone for name in found})
        files = {name: piece for _, found in everyone for name, piece in found.items()}
        write_json(folder / PIECES, PartIndex(ranks=ranks.world, numbers=names, files=files))


class DistributedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint that several ranks wrote, by name; PpclError where a file is missing or damaged.

    As a mapping it gives them whole, on the CPU, and reads all of a kind when the first is asked for. `fill` reads no
    more than a rank needs. With `check` every file is read once, and its checksum compared.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self.folder = folder
        self._read: dict[str, dict[str, Tensor]] = {}
        index = read_json(inside(folder, PIECES), PartIndex)
        self._numbers = frozenset(index.numbers)
        for name, piece in index.files.items():
            path = inside(folder / FOLDER, name)
            size = path.stat().st_size if path.is_file() else 0
            if size != piece.size:
                raise PpclError(f"{path}: truncated, {size} bytes of {piece.size}")
            if check and sha256_of(path) != piece.sha256:
                raise PpclError(f"{path}: was changed after it was written")
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

        All ranks call it together, each with targets of its own, or one `alone` for itself. Raises PpclError where a
        target has another shape than what is stored, or a rank is lost.
        """
        flat = _flat(targets)
        for name, target in flat.items():
            if name not in self._shapes or self._shapes[name][1] != target.shape:
                raise PpclError(f"{self.folder}: {name} is not in it, or of another shape")
        with collective(), _checkpoint_errors(self.folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `alone` means that
            load(flat, storage_reader=self._reader(), no_dist=alone)

    def __getitem__(self, name: str) -> Tensor:
        kind = name.partition(".")[0]
        if kind not in self._read:
            self._read[kind] = {other: self.empty(other) for other in self if other.partition(".")[0] == kind}
            self.fill(self._read[kind], alone=True)
        return self._read[kind][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

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


def _flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors over the same memory, numbers with a dimension."""
    return {name: t.detach().reshape(1) if t.ndim == 0 else t.detach() for name, t in tensors.items()}


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn DCP's report of what failed on which rank into one line."""
    try:
        yield
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        reason = " ".join(str(failure[0]).split())[:200]
        raise PpclError(f"{folder}: checkpoint failed on rank {rank} ({reason})") from error


class DistributedCheckpoints:
    """Checkpoints of one stage, and of all students by their state-dict names, that all ranks write and
    read together.
    """

    def __init__(self, ranks: ProcessGroup, stage: Stage, students: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        # Sharded parameters are everyone's; of the students of a stage each is one rank's.
        whole = stage.whole if isinstance(stage, EditParallel) else stage.groups
        owners = stage.owners if isinstance(stage, EditParallel) else {}
        mine = [p for parameters in stage.groups.values() for p in parameters]
        everyones = [p for parameters in whole.values() for p in parameters]
        self._groups = [list(parameters) for parameters in stage.groups.values()]
        # What is numbered: this rank's parameters, and the number of each on one process.
        self._mine = {"optimizer": mine, "master": [p for p in mine if is_low(p)]}
        self._numbers = {
            "optimizer": _numbers(mine, everyones),
            "master": _numbers(self._mine["master"], [p for p in everyones if is_low(p)]),
        }
        self._own = stage.tensors()
        owner = {id(p): owners[edit] for edit, parameters in whole.items() if edit in owners for p in parameters}
        # A student that no rank trains now is the same on all; rank 0 writes it.
        self._written = {name for name, p in students.items() if owner.get(id(p), 0) == ranks.rank}

    def save(self, folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, all ranks together; rank 0 writes what is written once. Raises PpclError on all ranks
        where one cannot write or is lost; the checkpoints before are whole.
        """
        ranks, mine = self._ranks, dict(self._everyones(tensors))
        with ExitStack() as opened:
            beside = ranks.each(lambda: opened.enter_context(writing(folder, state)) if ranks.first else folder)
            write(Path(ranks.from_first(str(beside))), mine, ranks)
            ranks.each(opened.close)

    def local(self, start: LoadedCheckpoint) -> LoadedCheckpoint:
        """Return a checkpoint with this rank's tensors under this rank's names, the students left out."""
        tensors, targets, names = start.tensors, dict[str, Tensor](), dict[str, str]()
        for name in tensors:
            found = self._place(name)
            if found is None:
                continue
            stored = tensors.empty(name) if isinstance(tensors, DistributedTensors) else tensors[name]
            names[found[0]], parameter = name, found[1]
            # Sharded as the parameter is, where it has its shape.
            if isinstance(parameter, DTensor) and parameter.shape == stored.shape:
                targets[name] = torch.zeros_like(parameter, dtype=stored.dtype)
            else:
                targets[name] = torch.empty_like(stored, device="cpu")
        fill(targets, tensors)
        return replace(start, tensors={mine: targets[name] for mine, name in names.items()})

    def _place(self, name: str) -> tuple[str, Tensor | None] | None:
        """Return a stored tensor's name on this rank and the parameter it belongs to, None where it is not ours."""
        kind, _, rest = name.partition(".")
        number, dot, key = rest.partition(".")
        if kind == "students":
            return None
        if kind == "rng":
            return name, None
        if kind == "average":
            group = self._groups[int(number)]
            return (name, group[int(key)]) if int(key) < len(group) else None
        if kind in self._numbers:
            mine = self._numbers[kind].get(int(number))
            return None if mine is None else (f"{kind}.{mine}{dot}{key}", self._mine[kind][mine])
        own = self._own.get(name)
        return None if own is None else (name, own)

    def _everyones(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes, by the names of one process."""
        everyones = {kind: {mine: n for n, mine in numbers.items()} for kind, numbers in self._numbers.items()}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in everyones:
                number, dot, key = rest.partition(".")
                yield f"{kind}.{everyones[kind][int(number)]}{dot}{key}", tensor
            elif rest in self._written if kind == "students" else kind != "rng" or self._ranks.first:
                yield name, tensor


def _numbers(mine: list[Parameter], everyones: list[Parameter]) -> dict[int, int]:
    """Return a parameter's number on one process -> its number here."""
    place = {id(p): number for number, p in enumerate(everyones)}
    return {place[id(p)]: number for number, p in enumerate(mine)}
