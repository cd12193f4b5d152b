"""Graphs: blocks and stacks, sites, switches, partition, the executor, typed metas."""

from __future__ import annotations
