"""How an export is checked: reference, metrics, gate, sizes, integrity."""

from __future__ import annotations
