"""How fast this machine is, measured in under a second: for an estimate of the time, nothing else."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import torch

from ppcl_fx.train.bounded.schedule import Speeds

SIDE = 768
"""Rows of the matrices that are multiplied."""
PIECE = 16 * 2**20
"""Bytes that are written and read."""
SHARE = 0.5
"""What a model reaches of the speed of a bare matrix product."""


def measure_speeds(folder: Path, dtype: torch.dtype, device: torch.device) -> Speeds:
    """Return the machine's speeds.

    A file that was just written is read from the system's memory, so reading is taken to be as fast as writing.

    Args:
        folder: a folder on the disk that will be used; made if it is not there.
        dtype: dtype of the matrix products.
        device: where they are computed.
    """
    disk = _disk(folder)
    return Speeds(flops=SHARE * _flops(dtype, device), read=disk, write=disk)


def _flops(dtype: torch.dtype, device: torch.device) -> float:
    one = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    (one @ one).sum().item()  # a first product sets things up
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.1:
        (one @ one).sum().item()
        count += 1
    return 2 * SIDE**3 * count / (time.perf_counter() - begin)


def _disk(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".speed-{uuid.uuid4().hex[:8]}"
    piece = os.urandom(PIECE)
    begin = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return PIECE / (time.perf_counter() - begin)
