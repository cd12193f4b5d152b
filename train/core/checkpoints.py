"""Checkpoints that a killed run cannot spoil: tensors in safetensors, the rest in checked JSON, no pickle anywhere."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import (
    Record,
    inside,
    new_folder,
    read_json,
    read_safetensors,
    sha256_of,
    tensor_shapes,
    write_json,
    write_safetensors,
    write_text,
)
from ppcl_fx.io.reading import INDEX_BYTES, read_text
from ppcl_fx.schema.curves import StageCurves

KEPT = 2
"""Checkpoints that stay on disk: the last, and the one before in case the last is damaged."""
TENSORS = "state.safetensors"
PIECES = "pieces.json"
"""In place of the tensors' file, where several ranks wrote (`ppcl_fx.train.distributed.distributed_checkpoint`)."""
STATE = "state.json"
SUMS = "SHA256SUMS"
"""The checksums of the other two files, as `sha256sum -c` reads them."""
_NAME = re.compile(r"^(\d{2})-(\d{8})$")
_HALF = re.compile(r"\.\d{2}-\d{8}\.partial-[0-9a-f]{8}")
_INT = ":int"
_Found = TypeVar("_Found")
_log = logging.getLogger("ppcl_fx.train")


class RunIdentity(Record):
    """What a checkpoint belongs to. A run goes on from it only where all three are the same."""

    plan: str
    calls: str
    options: dict[str, Any]

    def check(self, wanted: RunIdentity, where: Path) -> None:
        """Raise PpclError, naming the first difference, unless `wanted` is this identity."""
        mend = "give what that run was given, or train into another folder"
        if self.plan != wanted.plan:
            raise PpclError(f"{where}: this checkpoint is of another plan or model; {mend}")
        if self.calls != wanted.calls:
            raise PpclError(f"{where}: this checkpoint was trained on other calls; {mend}")
        for name in sorted(self.options.keys() | wanted.options.keys()):
            was, now = self.options.get(name), wanted.options.get(name)
            if was != now:
                raise PpclError(f"{where}: this checkpoint was trained with {name} {was!r}, not {now!r}; {mend}")


class State(Record):
    """The JSON half of a checkpoint: where the run stood and the curves up to there.

    `stage` counts the run's stages from 0, `step` the steps of that stage that are done.
    """

    version: Literal[1] = 1
    identity: RunIdentity
    stage: int = Field(ge=0)
    step: int = Field(ge=0)
    over: bool = Field(False, description="whether the stage is done; early where every student has stopped")
    curves: list[StageCurves]

    @property
    def ended(self) -> bool:
        """Whether this is the last step of the run's last stage."""
        steps = self.identity.options["steps"]
        return self.stage == len(steps) - 1 and (self.over or self.step == steps[-1])


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint read back: its JSON half, its tensors by name, and the folder it came from."""

    state: State
    tensors: Mapping[str, Tensor]
    folder: Path


@contextmanager
def writing(folder: Path, state: State) -> Iterator[Path]:
    """Yield the folder for the tensors of a new checkpoint in `folder`; drop all but the last `KEPT` at the end.

    Later checkpoints are dropped too: the run went on from an earlier one because they were damaged. Raises PpclError
    where the place cannot be written; the checkpoints that were there still are.
    """
    target = folder / f"{state.stage:02d}-{state.step:08d}"
    with new_folder(target, replaces=owned.CHECKPOINT) as beside:
        yield beside
        write_json(beside / STATE, state)
        names = (PIECES if (beside / PIECES).exists() else TENSORS, STATE)
        write_text(beside / SUMS, "".join(f"{sha256_of(beside / name)}  {name}\n" for name in names))
    found = existing(folder)
    place = found.index(target) + 1
    for old in found[: max(0, place - KEPT)] + found[place:]:
        owned.discard(old, owned.CHECKPOINT)


def save(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint into `folder`, as `writing`, and return its folder."""
    with writing(folder, state) as beside:
        write_safetensors(beside / TENSORS, tensors)
    return folder / f"{state.stage:02d}-{state.step:08d}"


@dataclass
class CheckpointWriter:
    """Writes a run's checkpoints, and restores students and curves from them."""

    folder: Path
    identity: RunIdentity
    students: Mapping[str, Tensor]  # what is in every checkpoint, by its name in the state dict
    device: torch.device | None  # whose random generator is stored too; None to store none
    curves: list[StageCurves] = field(default_factory=list)  # one entry a stage, the current one last
    save: Callable[..., object] = save
    beginning: Callable[[str], Tensor] | None = None  # gives what training began with, where it can be read again

    def write(self, step: int, tensors: Mapping[str, Tensor], *, over: bool = False) -> None:
        """Write a checkpoint of the current stage after `step` of its steps: the students and `tensors`."""
        students = {f"students.{name}": value.detach() for name, value in self.students.items()}
        states = rng_state(self.device) if self.device is not None else {}
        stage = len(self.curves) - 1
        state = State(identity=self.identity, stage=stage, step=step, over=over, curves=self.curves)
        self.save(self.folder, state, {**students, **tensors, **states})

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Set the students and the curves to what the checkpoint holds."""
        self.curves = [curves.model_copy(deep=True) for curves in checkpoint.state.curves]
        set_tensors({f"students.{name}": value for name, value in self.students.items()}, checkpoint.tensors)

    def go_back(self, parameters: list[Parameter]) -> str:
        """Set some of the students' parameters to earlier values; return which, or nothing where there are none."""
        last, wanted = latest(self.folder, self.identity), {id(parameter) for parameter in parameters}
        earlier = self.beginning if last is None else lambda name: last.tensors[f"students.{name}"]
        if earlier is None:
            return ""
        with torch.no_grad():
            for name, value in self.students.items():
                if id(value) in wanted:
                    value.copy_(earlier(name))
        return ("the weights that it began with" if last is None else "the last checkpoint's weights") + " are kept"


def existing(folder: Path) -> list[Path]:
    """Return the checkpoints' folders in `folder`, oldest first, without what a killed run left half-written."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and _NAME.match(path.name))


def clear(folder: Path) -> None:
    """Remove all checkpoints from `folder`, half-written ones included. Raises PpclError where one holds something
    that training does not write.
    """
    for path in existing(folder):
        owned.discard(path, owned.CHECKPOINT)
    for path in folder.glob(".*.partial-*"):
        if _HALF.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def latest(folder: Path, identity: RunIdentity) -> LoadedCheckpoint | None:
    """Return the newest whole checkpoint in `folder`, or None where there is none at all.

    A damaged one is passed over with a warning for the one before it. Raises PpclError where every checkpoint there
    is damaged, or the newest whole one belongs to another plan, calls or options.
    """
    found, damaged = _newest(folder, read)
    if found is not None:
        found.state.identity.check(identity, found.folder)
    elif damaged is not None:
        raise PpclError(f"{folder}: no whole checkpoint is left ({damaged}); remove the folder and train again")
    return found


def peek(folder: Path) -> State | None:
    """Return the JSON half of the newest readable checkpoint, or None where there is none."""
    return _newest(folder, _state)[0]


def _newest(folder: Path, open_: Callable[[Path], _Found]) -> tuple[_Found | None, PpclError | None]:
    """Return the newest checkpoint that opens, and without one why the oldest does not."""
    damaged = None
    for path in reversed(existing(folder)):
        try:
            return open_(path), None
        except PpclError as error:
            _log.warning("damaged checkpoint passed over: %s", error)
            damaged = error
    return None, damaged


def read(path: Path, *, check: bool = True) -> LoadedCheckpoint:
    """Read the checkpoint in `path`; with `check`, compare every checksum. Raises PpclError where it is damaged."""
    state, shared = _state(path, check), (path / PIECES).is_file()
    if check:
        _check_sum(path, PIECES if shared else TENSORS)
    if not shared:
        return LoadedCheckpoint(state, read_safetensors(inside(path, TENSORS)), path)
    # Only here: distributed checkpoints are slow to import.
    from ppcl_fx.train.distributed.distributed_checkpoint import DistributedTensors

    return LoadedCheckpoint(state, DistributedTensors(path, check=check), path)


def _state(path: Path, check: bool = True) -> State:
    if check:
        _check_sum(path, STATE)
    return read_json(inside(path, STATE), State, INDEX_BYTES)


def _check_sum(path: Path, name: str) -> None:
    lines = read_text(inside(path, SUMS)).splitlines()
    if name == TENSORS:
        tensor_shapes(inside(path, name))  # the file is as long as its header says, and not endless
    elif (path / name).is_file() and (path / name).stat().st_size > INDEX_BYTES:
        raise PpclError(f"{path / name}: larger than such a file may be; it is damaged")
    if f"{sha256_of(inside(path, name))}  {name}" not in lines:
        raise PpclError(f"{path / name}: its checksum is not the one in {SUMS}")


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's random generators, of the CPU and of `device`, as tensors."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set what `rng_state` returned."""
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors called ``optimizer.<number of the parameter>.<key>``.

    A plain integer (the step count of the 8-bit AdamW) becomes a tensor called ``...<key>:int``. What the 8-bit AdamW
    keeps in a dictionary of its own (the averages' bytes and the maps to read them) stands beside the rest, as it
    takes them too. Raises RuntimeError where the optimiser keeps something that is neither.
    """
    tensors: dict[str, Tensor] = {}
    for number, slots in optimizer.state_dict()["state"].items():
        inner = [value.items() for value in slots.values() if isinstance(value, dict)]
        for key, value in chain(slots.items(), *inner):
            plain = torch.tensor(value) if type(value) is int else value
            if isinstance(plain, Tensor):
                tensors[f"optimizer.{number}.{key}{_INT if plain is not value else ''}"] = plain
            elif not isinstance(plain, dict):
                kind = type(value).__name__
                raise RuntimeError(f"the optimiser keeps a {kind} as {key!r}; only tensors can be stored")
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set what `optimizer_state` returned; other names in `tensors` are left alone."""
    slots: dict[int, dict[str, Tensor | int]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            plain = int(value) if key.endswith(_INT) else value.clone()
            slots.setdefault(int(number), {})[key.removesuffix(_INT)] = plain
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def set_tensors(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors with the stored ones of their names; other stored names are left alone."""
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(tensors[name])
