"""Calls: recorded inputs of a transformer, how they are recorded, stored and put together."""

from __future__ import annotations

from ppcl_fx.calls.store import Call, Calls

__all__ = ["Call", "Calls"]
