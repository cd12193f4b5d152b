"""The pluggable model and what belongs to it: how it is made, opened, moved, seen by pipelines and kept in folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppcl_fx._names import lazy

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel, load

__all__ = ["PluggableModel", "load"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, {"ppcl_fx.model.pluggable": __all__})
