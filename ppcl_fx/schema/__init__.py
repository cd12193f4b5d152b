"""What is written as JSON: plans, analyses, costs, measured effects, curves."""

from __future__ import annotations
