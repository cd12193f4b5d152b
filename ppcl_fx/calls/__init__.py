"""Calls: recorded inputs of a transformer, how they are recorded, stored and put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Call, Calls

__all__ = ["Call", "Calls"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, dict.fromkeys(__all__, "ppcl_fx.calls.store"))
