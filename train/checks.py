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

    backends = list_backends(None)
    if config.compile_backend not in backends:
        hint = near(config.compile_backend, backends)
        raise PpclError(
            f"training option compile_backend: no backend {config.compile_backend!r}{hint}; "
            f"there are {', '.join(backends)}"
        )


def check_places(folder: Path, logs: Path | None, finetuned: Path | None) -> None:
    """Refuse, before any work, a place that cannot be written, a link, and what no training wrote.

    Args:
        folder: the output folder.
        logs: the folder of the logs; None where none are written.
        finetuned: the fine-tuned model's folder; None without that stage.

    Raises:
        PpclError: there is such a thing.
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
    if first and not _is_ours(first):
        raise PpclError(f"{logs / LOG}: no training wrote it, so it is not replaced; {advice}")


def _is_ours(line: str) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"time", "stage", "step"} <= found.keys()
