"""What pipelines ask for around a call: the context of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Uncached:
    """A transformer without caches of its own; pipelines name the guidance branch of a call all the same."""

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Do nothing: the branch, and where the loop stands, are told to caches that this model does not have."""
        del name, where
        yield
