"""The pipeline that the tests of data draw on."""

from __future__ import annotations

import pytest

from ppcl_fx.shapes.pipeline import ShapesPipeline
from tests.shapes_folder import save_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ShapesPipeline:
    """A small random pipeline in pixel space, whose scheduler shifts by 3."""
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline"), blocks=1)
    loaded: ShapesPipeline = ShapesPipeline.from_pretrained(folder)
    return loaded
