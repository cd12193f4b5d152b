"""Folders that other programs read or write: the released layout, and plain diffusers folders of pruned models."""

from __future__ import annotations
