"""Delta and Algorithm 1 on curves made by hand."""

from __future__ import annotations

import pytest

from ppcl_fx.passes.analysis.intervals import algorithm_1, first_difference, interval_end, shifted
from ppcl_fx.schema.analysis import Interval, Matrix


def _curves(size: int, rows: dict[int, list[float]]) -> Matrix:
    """A Delta matrix from hand-written rows: ``rows[u]`` holds Delta(u, u+1), Delta(u, u+2), ..."""
    delta: Matrix = [[None] * size for _ in range(size)]
    for u in range(size):
        values = rows.get(u, [])
        for k in range(u + 1, size):
            # Beyond what a test writes the curve keeps falling.
            delta[u][k] = values[k - u - 1] if k - u - 1 < len(values) else -float(k)
    return delta


def _pairs(found: list[Interval]) -> list[tuple[int, int, bool]]:
    return [(interval.first, interval.last, interval.open_ended) for interval in found]


def test_delta_starts_from_a_similarity_of_one() -> None:
    cka: Matrix = [[1.0, 0.9, 0.85], [None, 1.0, 0.7], [None, None, 1.0]]
    delta = first_difference(cka)
    assert delta[0] == [None, pytest.approx(0.1), pytest.approx(0.05)]
    assert delta[1] == [None, None, pytest.approx(0.3)]
    assert delta[2] == [None, None, None]


def test_algorithm_2_of_the_paper() -> None:
    """Start at 3: Delta(3, 5) > Delta(3, 4), so k = 5 triggers, v = 4, and the search goes on from 5."""
    delta = _curves(9, {3: [0.2, 0.3], 5: [0.4, 0.3, 0.35]})
    assert interval_end(delta[3], 3) == (4, False)
    assert _pairs(algorithm_1(delta, start=3)) == [
        (3, 4, False),
        (5, 7, False),
    ]  # 8, left alone, makes no interval


def test_intervals_lie_back_to_back_and_end_before_the_first_rise() -> None:
    delta = _curves(10, {0: [0.5, 0.4, 0.3, 0.6], 4: [0.1, 0.1, 0.05, 0.2]})
    # Equal values are no rise: Eq. 5 asks for strictly more.
    assert _pairs(algorithm_1(delta)) == [(0, 3, False), (4, 7, False), (8, 9, True)]


def test_where_delta_never_rises_the_interval_is_open_ended() -> None:
    assert _pairs(algorithm_1(_curves(6, {0: [0.5, 0.4, 0.3, 0.2, 0.1]}))) == [(0, 5, True)]


@pytest.mark.parametrize("size", [0, 1])
def test_stacks_too_short_for_an_interval(size: int) -> None:
    assert algorithm_1(_curves(size, {})) == []


def test_undefined_curves_have_no_candidates() -> None:
    assert algorithm_1([[None] * 4 for _ in range(4)]) == []


def test_positions_become_module_list_indices() -> None:
    assert shifted([Interval(first=0, last=2, open_ended=True)], 5) == [
        Interval(first=5, last=7, open_ended=True)
    ]
