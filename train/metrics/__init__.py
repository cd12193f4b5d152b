"""What is measured while training runs, and of its students."""

from __future__ import annotations
