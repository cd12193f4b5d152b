"""What is looked at before a training begins: what its options need, and the places that it writes to."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import check_writable
from ppcl_fx.schema.curves import LOSSES
from ppcl_fx.train.config import CONFIG, TrainConfig
from ppcl_fx.train.core.optimizer import try_eight_bit
from ppcl_fx.train.metrics.logger import EVENTS, LOG

CHECKPOINTS = "checkpoints"
LOGS = "logs"


def check_here(config: TrainConfig, device: torch.device) -> None:
    """Raise `PpclError` for what is not installed or does not run on this device, and options that need others."""
    if config.optimizer == "adamw8bit":
        try_eight_bit(device)
    if config.patience is not None and not config.held_out:
        raise PpclError("training option patience: needs held-out calls to see a gain; give held_out a share")
    check_backend(config)


def check_backend(config: TrainConfig) -> None:
    """Raise `PpclError` where blocks are to be compiled and the backend is not here."""
    if not config.compile:
        return
    from torch._dynamo import list_backends

    backend, backends = config.compile_backend, list_backends(None)
    if backend not in backends:
        there = f"no backend {backend!r}{near(backend, backends)}; there are {', '.join(backends)}"
        raise PpclError(f"training option compile_backend: {there}")


def check_places(folder: Path, logs: Path | None, finetuned: Path | None) -> None:
    """Raise `PpclError`, before any work, for a place that cannot be written, a link, and what no training wrote.

    There are an output folder, perhaps one of logs, and with that stage one of the fine-tuned model.
    """
    check_writable(folder)
    if logs is not None:
        check_writable(logs)
    for name in (CHECKPOINTS, LOGS):
        owned.check_no_link(folder / name)
    owned.check_file(folder / CONFIG, mark=owned.OPTIONS_MARK)
    owned.check_file(folder / LOSSES, keys=("stages",))
    if finetuned is not None:
        owned.check_no_link(finetuned)
        owned.check_replaceable(finetuned, owned.FINETUNED)
    if logs is not None:
        _check_logs(logs)


def _check_logs(logs: Path) -> None:
    """Lines and events of an earlier training are replaced, and nothing that only has their names."""
    for path in (logs / LOG, logs / EVENTS, *(logs / EVENTS).glob("*")):
        owned.check_no_link(path)
    if not (logs / LOG).exists():
        return
    advice = "choose another folder for the logs"
    if not (logs / LOG).is_file():
        raise PpclError(f"{logs / LOG}: is no file, and the log is to be written there; {advice}")
    with (logs / LOG).open(encoding="utf-8", errors="replace") as file:
        first = file.readline(2**20)
    try:
        found = json.loads(first or "{}")
    except (ValueError, RecursionError):
        found = None
    if first and not (isinstance(found, dict) and {"time", "stage", "step"} <= found.keys()):
        raise PpclError(f"{logs / LOG}: no training wrote it, so it is not replaced; {advice}")
