"""Quantised weights: how they are stored, how they are rounded, and which layers take it."""

from __future__ import annotations
