"""Checkpoints that all ranks of a run write and read together.

A rank's optimiser numbers its own parameters. In a checkpoint they have the numbers that one process gives them, so a
run goes on with any number of ranks, or with one process and none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.errors import PpclError
from ppcl_fx.train import checkpoints, pieces
from ppcl_fx.train.checkpoints import Checkpoint
from ppcl_fx.train.optimizer import is_low
from ppcl_fx.train.parallel import Intervals
from ppcl_fx.train.ranked import FAULT, heard
from ppcl_fx.train.ranks import Ranks
from ppcl_fx.train.stages import Stage


class Together:
    """Checkpoints of one stage that all ranks write and read together.

    Args:
        ranks: This process among the others.
        stage: The stage.
        students: The pluggable model's students, state-dict name -> parameter.
    """

    def __init__(self, ranks: Ranks, stage: Stage, students: Mapping[str, Tensor]) -> None:
        self._ranks = ranks
        # Sharded parameters are everyone's; of the students of a stage each is one rank's.
        whole = stage.whole if isinstance(stage, Intervals) else stage.groups
        owners = stage.owners if isinstance(stage, Intervals) else {}
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

    def save(
        self,
        folder: Path,
        identity: Any,
        number: int,
        step: int,
        curves: Any,
        tensors: Mapping[str, Tensor],
        **rest: Any,
    ) -> None:
        """Do what `checkpoints.save` does, all ranks together; rank 0 writes what is written once.

        Raises:
            PpclError: A rank cannot write or is lost. All ranks raise it, and the checkpoints before are whole.
        """
        mine = dict(self._everyones(tensors))
        if not self._ranks.first:
            pieces.write(Path(heard(self._ranks)), mine, self._ranks)
            heard(self._ranks)
            return
        waiting = True  # whether the others wait for a word of this rank

        def put(beside: Path, _: Mapping[str, Tensor]) -> str:
            nonlocal waiting
            waiting = False
            self._ranks.words(str(beside))
            pieces.write(beside, mine, self._ranks)
            waiting = True
            return checkpoints.PIECES

        try:
            checkpoints.save(folder, identity, number, step, curves, tensors, put=put, **rest)
        except PpclError as error:
            if waiting:
                self._ranks.words(f"{FAULT}{error}")
            raise
        self._ranks.words("")

    def local(self, start: Checkpoint) -> Checkpoint:
        """Return a checkpoint with this rank's tensors under this rank's names, the students left out."""
        targets: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for name in start.tensors:
            found = self._place(name)
            if found is not None:
                names[found[0]] = name
                targets[name] = pieces.like(name, start.tensors, found[1])
        pieces.fill(targets, start.tensors)
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


def students_of(start: Checkpoint, students: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint with the tensors of the students alone, read by this rank and whole."""
    names = [f"students.{name}" for name in students]
    if not isinstance(start.tensors, pieces.Pieces):
        return start
    targets = {name: start.tensors.empty(name) for name in names}
    start.tensors.fill(targets, alone=True)
    return replace(start, tensors=targets)


def _numbers(mine: list[Parameter], everyones: list[Parameter]) -> dict[int, int]:
    """Return a parameter's number on one process -> its number here."""
    place = {id(p): number for number, p in enumerate(everyones)}
    return {place[id(p)]: number for number, p in enumerate(mine)}
