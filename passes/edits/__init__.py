"""The edits of a plan as passes: depth, feed-forward, text stream; and how they are plugged."""

from __future__ import annotations
