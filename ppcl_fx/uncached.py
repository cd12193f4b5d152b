"""What pipelines ask for around a call: the context of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Uncached:
    """A transformer without caches of its own; pipelines name the guidance branch of a call all the same."""

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Do nothing: the branch is named for caches that this model does not have."""
        del name
        yield
