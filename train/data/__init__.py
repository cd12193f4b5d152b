"""Training data that is made as training goes on: prompts that the teacher draws, caches, samplers."""

from __future__ import annotations
