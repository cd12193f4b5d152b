"""Qwen-Image, FLUX, SD3.5 and Chroma: the exported file agrees with the model at lengths that it was never tried at."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.export import ExportConfig, Translations, export_graph, lower
from ppcl_fx.export.one_graph import Exported
from ppcl_fx.export.verify.metrics import difference
from ppcl_fx.export.verify.onnx_runner import run, session
from ppcl_fx.tracing import bind, trace
from tests import models
from tests.coverage import dual
from tests.coverage.case import EXAMPLE, Case, Shape
from tests.export.operators import fused_operators, operators

pytestmark = pytest.mark.slow

FAMILIES: dict[str, Case] = {
    "qwen": Case("QwenImageTransformer2DModel", lambda: models.tiny_qwen(blocks=3)[0], dual.qwen),
    **{
        name: next(case for case in dual.CASES if case.id == known)
        for name, known in {
            "flux": "FluxTransformer2DModel",
            "sd3": "SD3Transformer2DModel (dual attention)",
            "chroma": "ChromaTransformer2DModel",
        }.items()
    },
}
UNSEEN = {
    "longer, one sample": Shape(batch=1, height=12, width=20, text=29, seed=5),
    "shorter, three samples": Shape(batch=3, height=6, width=4, text=3, seed=6),
}
"""Beyond the traced shape, and none of those that the export itself compares at."""

TOLERANCE = 1e-5

PER_BLOCK = {
    "qwen": {"transformer_blocks.1": (1, 4, 4)},
    "flux": {"transformer_blocks.1": (1, 4, 2), "single_transformer_blocks.1": (1, 2, 2)},
    "sd3": {"transformer_blocks.1": (2, 6, 0), "transformer_blocks.4": (1, 4, 0)},
    "chroma": {"transformer_blocks.1": (1, 4, 2), "single_transformer_blocks.1": (1, 2, 2)},
}
"""``Attention``, ``RMSNormalization`` and ``RotaryEmbedding`` in one block: all that it has, fused."""

BLOCK_KINDS = {"qwen": 2, "flux": 3, "sd3": 3, "chroma": 3}
"""Blocks that differ: of each stack, with one attention or two, and the last, whose text half nobody reads."""

WRITTEN_OUT = ("Softmax", "ReduceMean", "Pow", "Sqrt", "Reciprocal", "Neg")
"""What attention, the norms and rotations would be made of in a block."""


@dataclass(frozen=True)
class Family:
    """A small model and its exported file."""

    name: str
    case: Case
    model: nn.Module
    gm: GraphModule
    exported: Exported
    known: Translations


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Each family in turn, exported once."""
    case = FAMILIES[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' Chroma uses a name that diffusers has moved
        model = case.build()
    kwargs = case.kwargs()
    gm = trace(model, kwargs)
    calls = Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=EXAMPLE.batch)])
    file: Path = tmp_path_factory.mktemp("family") / "family.onnx"
    known = Translations()
    exported = export_graph(gm, file, ExportConfig(tolerance=TOLERANCE, runs=1), calls=calls, known=known)
    return Family(request.param, case, model, gm, exported, known)


def test_parity_at_the_shapes_of_the_export(family: Family) -> None:
    names = {name.partition("=")[0] for name in family.exported.parity}
    assert {"traced", "batch", "encoder_hidden_states_1", "all"} < names
    assert any(name.startswith("hidden_states_") for name in names)
    assert 0 < family.exported.parity_max_abs < TOLERANCE


@pytest.mark.parametrize("unseen", UNSEEN)
def test_parity_at_unseen_lengths(family: Family, unseen: str) -> None:
    kwargs = family.case.kwargs(UNSEEN[unseen])
    with torch.no_grad():
        expected = family.model(**kwargs)[0]
    feeds = lower(family.gm).feeds(bind(family.gm, kwargs))
    assert difference(run(session(family.exported.onnx, threads=1), feeds), expected) < TOLERANCE


def test_blocks_hold_fused_operators_alone(family: Family) -> None:
    model = ir.load(family.exported.onnx)
    found = operators(model)
    for block, expected in PER_BLOCK[family.name].items():
        counts = found[block]
        assert (counts["Attention"], counts["RMSNormalization"], counts["RotaryEmbedding"]) == expected
        assert {name: counts[name] for name in WRITTEN_OUT} == dict.fromkeys(WRITTEN_OUT, 0)
    blocks = [counts for name, counts in found.items() if "blocks" in name]
    assert fused_operators(model)["Attention"] == sum(counts["Attention"] for counts in blocks)


def test_activation_of_the_timestep_is_computed_once(family: Family) -> None:
    found = operators(ir.load(family.exported.onnx))
    with_it = [name for name, counts in found.items() if "blocks" in name and counts["Sigmoid"]]
    first = [name for name in found if "blocks" in name][:1]
    assert with_it == ([] if family.name == "chroma" else first)


def test_look_alike_blocks_are_translated_once(family: Family) -> None:
    segments = {name for name in operators(ir.load(family.exported.onnx)) if "blocks" in name}
    assert len(segments) > BLOCK_KINDS[family.name]
    assert family.known.reused >= len(segments) - BLOCK_KINDS[family.name]
