"""Pluggable models for LoRAs, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest

from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests.lora import loras


@pytest.fixture(scope="package")
def pluggable() -> dict[str, PluggableModel]:
    edit = DepthEdit(stack="transformer_blocks", first=0, last=1)
    traced = {name: trace(*build()) for name, build in loras.BUILD.items()}
    return {name: rewrite(gm, Plan(edits=[edit])) for name, gm in traced.items()}


@pytest.fixture(params=list(loras.BUILD))
def any_model(request: pytest.FixtureRequest, pluggable: dict[str, PluggableModel]) -> Any:
    model = pluggable[request.param]
    yield request.param, model
    model.unload_lora()
    model.plug(students=[])


@pytest.fixture
def model_of(pluggable: dict[str, PluggableModel]) -> Any:
    yield pluggable.__getitem__
    for model in pluggable.values():
        model.unload_lora()
        model.plug(students=[])
