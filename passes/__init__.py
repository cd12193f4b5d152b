"""What reads and edits graphs, one pass a file."""

from __future__ import annotations
