"""Measurements of the package. Each script writes benchmarks/results/<machine>-<what>.json."""

from __future__ import annotations
