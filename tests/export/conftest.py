"""Blocks that are alike are translated once for all tests of a process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _every_test(translated_once: None) -> None:
    """Every test here exports."""
