"""Analysis passes: they annotate nodes with what was found, and edit nothing."""

from __future__ import annotations
