"""The pluggable model and what belongs to it: how it is made, opened, moved, seen by pipelines and kept in folders."""

from __future__ import annotations

from ppcl_fx.model.pluggable import PluggableModel, load

__all__ = ["PluggableModel", "load"]
