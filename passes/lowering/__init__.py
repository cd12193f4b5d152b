"""Lowering passes: from a graph as traced to one that exporters and kernels take."""

from __future__ import annotations
