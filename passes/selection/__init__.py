"""Selection: from an analysis and a budget to a plan."""

from __future__ import annotations
