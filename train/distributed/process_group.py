"""Processes that train together: who this one is, and what they say to each other. Alone, all of it does nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_fx.errors import PpclError

T = TypeVar("T")
TIMEOUT = 600.0  # seconds that a rank waits for the others before it takes them for lost
SECONDS = 90.0
"""How late a network disk may show what another node wrote; NFS remembers a missing name for up to 60 s."""
_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "tcpstore", "socket")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together."""

    rank: int = 0  # from 0; rank 0 alone prints and writes what is written once
    world: int = 1  # how many there are
    device: torch.device | None = None  # where its part of the work is done; None for wherever the model is

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here. Raises PpclError where one is lost."""
        self.sum(torch.zeros(1))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks of a tensor that each gives, by way of the CPU. PpclError where one is lost."""
        if self.alone:
            return tensor
        total = tensor.detach().cpu().clone()
        with collective():
            dist.all_reduce(total)
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is true on any rank: how all of them agree to stop at the same step."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag))) > 0)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` (a plain one) with what rank `source` has in it. Raises PpclError where it is lost."""
        if self.alone:
            return
        with collective(), torch.no_grad():
            carried = tensor.detach().cpu().contiguous()
            dist.broadcast(carried, source)
            if self.rank != source:
                tensor.copy_(carried)

    def gather(self, item: Any) -> list[Any]:
        """Return what each rank gives (anything small), by rank. Raises PpclError where one is lost."""
        if self.alone:
            return [item]
        found: list[Any] = [None] * self.world
        with collective():
            dist.all_gather_object(found, item)
        return found

    def each(self, work: Callable[[], T]) -> T:
        """Do this rank's part of some work, and return what came of it once every rank has done its own. Raises
        PpclError where a rank was refused, on all with the line of the first, or is lost.
        """
        if self.alone:
            return work()
        fault, found = "", None
        try:
            found = work()
        except PpclError as error:
            fault = str(error)
        for line in self.gather(fault):
            if line:
                raise PpclError(line)
        return cast(T, found)

    def from_first(self, item: T | None) -> T:
        """Return what rank 0 gives (anything small), on every rank. Raises PpclError where one is lost."""
        return cast(T, self.gather(item if self.first else None)[0])


ALONE = ProcessGroup()  # a world of one


@dataclass(frozen=True)
class Place:
    """Where a source's tensors go."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None  # what the floating ones of the calls' main dtype become; None leaves them
    ranks: ProcessGroup | None = None  # None for what `torch.distributed` says


def current() -> ProcessGroup:
    """Return this process's place in `torch.distributed`, or a world of one where that was not begun."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), _device())


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[ProcessGroup]:
    """Join the ranks that the environment names (`torchrun` and `accelerate launch` set it), and leave them after.

    gloo carries what is on the CPU, NCCL what is on a GPU; each rank of a node takes the GPU of its local number.
    Where `torch.distributed` was begun already, it is used and left as it is. `timeout` is how many seconds one waits
    for the others. Raises PpclError where the environment is incomplete, a rank has no GPU, or the others do not come.
    """
    if _number("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        yield current()
        return
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        _given(name)
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with collective(f"the {world} ranks did not come together"):
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield ProcessGroup(rank, world, device)
    except BaseException:
        # The others may wait in a collective: a closed connection tells them. NCCL would wait itself, and is left
        # to the end of the process.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def collective(what: str = "another rank is lost or does not answer") -> Iterator[None]:
    """Make an error of the communication between ranks a PpclError: what is done inside needs all of them."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not any(sign in text.lower() for sign in _SIGNS):
            raise
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK") else ""
        # Without the source file that it begins with.
        plain = text.partition("] ")[2] if text.startswith("[") else text
        short = plain.split(". This may")[0].split(". Original")[0][:160]
        raise PpclError(f"{rank}{what} ({short}); the last checkpoint is good, start again with --resume") from error


def wait_for(path: Path, ranks: ProcessGroup) -> None:
    """Wait until this rank sees what another one has written; PpclError where it does not come to be seen."""
    end = time.monotonic() + SECONDS
    while not ranks.alone and not path.exists():
        if time.monotonic() > end:
            raise PpclError(
                f"{path}: was written by another rank, and rank {ranks.rank} does not see it; "
                "keep the data on a disk that all ranks see"
            )
        time.sleep(0.1)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        why = f"local rank {local} has no GPU of its own, there are {count}"
        raise PpclError(f"{why}; start {count} ranks on this node")
    return torch.device("cuda", local)


def _number(name: str, default: int | None = None) -> int:
    if default is not None and not os.environ.get(name):
        return default
    text = _given(name)
    if not text.isdigit() or (name == "WORLD_SIZE" and int(text) < 1):
        raise PpclError(f"the environment variable {name} is {text!r}, not a number of ranks; start with torchrun")
    return int(text)


def _given(name: str) -> str:
    text = os.environ.get(name, "")
    if not text:
        raise PpclError(f"WORLD_SIZE is set and {name} is not; start with torchrun or accelerate launch")
    return text
