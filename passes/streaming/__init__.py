"""Analysis and rewriting of models larger than memory: one block's weights at a time."""

from __future__ import annotations
