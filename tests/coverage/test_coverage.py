"""Coverage: every transformer class of diffusers is in the table or left out for a reason, and no answer is wrong."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.errors import PpclError
from ppcl_fx.export import lower
from ppcl_fx.tracing import bind, trace
from tests.coverage.case import Case
from tests.coverage.excluded import EXCLUDED
from tests.coverage.exports import HALF, TYPES, YES, exported, loaded_in, read, typed
from tests.coverage.table import CASES, EQUAL, PAGE, measure, page

pytestmark = pytest.mark.coverage


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_row_holds_no_wrong_answer(case: Case) -> None:
    row = measure(case)
    assert row.example == EQUAL
    assert row.wrong == []


def test_every_transformer_class_of_diffusers_is_in_the_table_or_left_out_for_a_reason() -> None:
    exported = {name for name in dir(diffusers) if re.fullmatch(r"\w*Transformer\w*Model", name)}
    covered = {case.name for case in CASES}
    assert exported - covered - EXCLUDED.keys() == set()
    assert EXCLUDED.keys() <= exported - covered
    assert len(covered) >= 60


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == page(read(PAGE)), "run python -m tests.coverage.table --write"


def lowered(gm: GraphModule) -> tuple[str, list[torch.dtype | None]]:
    """The graph that is exported, in print, with the type of each node's value; or why it cannot be."""
    try:
        graph = lower(gm).graph.graph
    except PpclError as error:
        return str(error), []
    return str(graph), [getattr(node.meta.get("val"), "dtype", None) for node in graph.nodes]


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_model_loaded_in_float32_leaves_in_half_precision_as_one_that_was_loaded_so(case: Case, name: str) -> None:
    loaded, kwargs = loaded_in(case, HALF[name]), floats_as(case.kwargs(), HALF[name])
    try:
        wanted = trace(loaded, kwargs)
    except PpclError:  # the model wants numbers of its own type too, or does not run in half precision on a CPU
        with pytest.raises(PpclError, match="does not take this call"):
            typed(case, HALF[name])
        return
    graph = typed(case, HALF[name])
    assert {n: p.dtype for n, p in graph.named_parameters()} == {n: p.dtype for n, p in wanted.named_parameters()}
    assert graph.code == wanted.code
    assert lowered(graph) == lowered(wanted)
    with torch.no_grad():
        given, expected = (tree_leaves(one(**bind(one, kwargs))) for one in (graph, wanted))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_no_class_that_leaves_in_float32_lacks_a_type_without_a_reason() -> None:
    found = read(PAGE)
    assert found.keys() == {case.id for case in CASES}
    assert all(len(cell) > 2 for row in found.values() for cell in row.values())
    assert sum(row["fp32"] == row["bf16"] == YES for row in found.values()) >= 27


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("row", ["SD3Transformer2DModel", "AuraFlowTransformer2DModel"])
@pytest.mark.filterwarnings("ignore")
def test_the_columns_of_the_types_are_what_an_export_says(row: str, name: str) -> None:
    case = next(case for case in CASES if case.id == row)
    assert exported(case, name) == read(PAGE)[row][name]
