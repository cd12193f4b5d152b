"""Libraries that only export needs, imported when it starts."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ppcl_fx.errors import PpclError


def need(name: str, extra: str = "export", left: str = "") -> Any:
    """Import a library that an extra of this package brings; the message may say what is `left` without it.

    Raises:
        PpclError: it is not installed, or does not load; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        more = f"; {left}" if left else ""
        raise PpclError(f'{name} {reason}: pip install "ppcl-fx[{extra}]"{more}') from error


def check_export() -> None:
    """Raise `PpclError` unless everything the ONNX export needs is installed."""
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        need(name)


@contextmanager
def log_from(name: str, level: int) -> Iterator[None]:
    """Let a library's logger tell nothing below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
