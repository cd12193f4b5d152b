"""Distillation within a memory limit: the teacher is streamed, its states at the students' borders are cached."""

from __future__ import annotations
