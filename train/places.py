"""Where a training writes: what is there already is replaced only where a training wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from ppcl_fx import owned
from ppcl_fx.errors import PpclError
from ppcl_fx.files import check_writable
from ppcl_fx.train.config import CONFIG
from ppcl_fx.train.curves import LOSSES
from ppcl_fx.train.watch import EVENTS, LOG

CHECKPOINTS = "checkpoints"
LOGS = "logs"


def check_places(folder: Path, logs: Path | None, finetuned: str | None) -> None:
    """Refuse, before any work, a place that cannot be written, a link, and what no training wrote.

    Args:
        folder: the output folder.
        logs: the folder of the logs; None where none are written.
        finetuned: name of the fine-tuned model's folder; None without that stage.

    Raises:
        PpclError: there is such a thing.
    """
    for place in (folder, logs) if logs is not None else (folder,):
        check_writable(place)
    for name in (CHECKPOINTS, LOGS):
        owned.check_no_link(folder / name)
    owned.check_file(folder / CONFIG, mark=owned.OPTIONS_MARK)
    owned.check_file(folder / LOSSES, keys=("stages",))
    if finetuned is not None:
        owned.check_no_link(folder / finetuned)
        owned.check_replaceable(folder / finetuned, owned.FINETUNED)
    if logs is not None:
        _check_logs(logs)


def _check_logs(logs: Path) -> None:
    """Lines and events of an earlier training are replaced, and nothing that only has their names."""
    owned.check_no_link(logs / LOG)
    owned.check_no_link(logs / EVENTS)
    events = logs / EVENTS
    if events.is_dir():
        for stage in events.iterdir():
            owned.check_no_link(stage)
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
