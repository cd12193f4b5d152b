"""The fuzzer's first 300 inputs: no traceback, no hang, no result that is not the undamaged input's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import Fuzzer, Outcome

pytestmark = pytest.mark.slow

INPUTS = 300


def test_damaged_inputs_are_refused_in_one_line_or_do_no_harm(tmp_path: Path) -> None:
    fuzzer, outcome = Fuzzer(tmp_path / "world", seed=0), Outcome()
    for number in range(INPUTS):
        fuzzer.input(number, outcome)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert sum(outcome.counts.values()) == INPUTS
    assert outcome.counts["refused"] > INPUTS / 2  # a fuzzer whose inputs all pass would show nothing
