"""Coverage: every transformer class of diffusers is in the table or left out for a reason, and no answer is wrong."""

from __future__ import annotations

import re

import diffusers
import pytest

from tests.coverage.case import Case
from tests.coverage.excluded import EXCLUDED
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
    assert PAGE.read_text() == page(), "run python -m tests.coverage.table --write"
