"""Blocks that are alike are translated once for all tests of a process: PyTorch takes seconds for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_store_of_translations() -> Iterator[None]:
    """Let every export that is given no translations share one store of them, as the ratios of a model do."""
    from ppcl_fx.export import stitching

    known = stitching.Translations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "Translations", lambda: known)
        yield
