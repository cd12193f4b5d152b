"""Distillation within a memory limit: the teacher streamed, its states cached at the edits' borders, students in turn."""

from __future__ import annotations
