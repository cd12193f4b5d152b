"""Many processes: their group, what they agree on, and how work is divided among them."""

from __future__ import annotations
