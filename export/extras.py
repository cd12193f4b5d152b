"""Libraries that only export needs, imported when it starts."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ppcl_fx.errors import PpclError


def need(name: str, extra: str = "export", left: str = "") -> Any:
    """Import a library of an extra.

    Args:
        name: the module.
        extra: the extra of this package that brings it.
        left: what stays usable without it, for the message.

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
        module: ModuleType = need(name)
        del module
