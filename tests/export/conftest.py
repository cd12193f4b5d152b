"""Blocks that are alike are translated once for all tests of a process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _translated_once(one_store_of_translations: None) -> None:
    """Every test here exports."""
