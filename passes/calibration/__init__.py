"""Calibration: the teacher runs on recorded calls, and sums, probes and projectors come out."""

from __future__ import annotations
