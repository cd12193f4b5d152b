"""The schedule is a pure function: what fits, what is fastest, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.train.bounded.costs import ProblemCost, Speeds, TeacherCost, moment_bytes
from ppcl_fx.train.bounded.schedule import CLEARLY, MARGIN, Capacity, PricedWork, Pricing, Schedule

MIB = 2**20
BLOCKS = 12
TEACHER = TeacherCost(flops=(10**9,) * BLOCKS, weights=(MIB,) * BLOCKS, states=(MIB,) * BLOCKS, block=4 * MIB)
EVEN = Speeds(flops=1e9, read=2.0**30, write=2.0**30)


def student(number: int) -> ProblemCost:
    """The state where it ends is the state where the next one begins."""
    border = {f"state{number}": 3 * MIB, f"state{number + 1}": 3 * MIB, "time": 4096}
    return ProblemCost(
        held=20 * MIB,
        saved=14 * MIB,
        weights=2 * MIB,
        step=5 * MIB,
        flops=10**9,
        border=border,
        last=3 * number + 2,
    )


def planned(memory: int, disk: int, speeds: Speeds = EVEN, **more: Any) -> Schedule:
    given = {"steps": 20, "calls": 10, "checkpoints": 3, **more}
    order = [(step % given["calls"],) for step in range(given["steps"])]
    work = PricedWork(order, [1.0] * given["calls"])
    students = [student(number) for number in range(4)]
    return Pricing(students, TEACHER, work, Capacity(memory + MARGIN, disk), speeds).plan(
        given["checkpoints"]
    )


def test_with_room_everything_is_cached_in_memory_and_trains_at_once() -> None:
    found = planned(1000 * MIB, 1000 * MIB)
    assert (found.kind, found.at_once, found.price.passes) == ("cached", 4, 1)
    # Five states of 3 MiB and the time, for each of ten calls: what two students share is there once.
    assert found.price.cache_memory == 10 * (15 * MIB + 4096)
    assert found.price.cache_disk == 0
    assert found.price.teacher_flops == 10 * BLOCKS * 1e9
    assert found.price.training_flops == 20 * 4 * 1e9
    assert found.disk == 2 * 4 * 2 * MIB + 3 * 4 * 14 * MIB
    assert found.sweeps[0].windows == ((0, 20),)


def test_as_many_students_train_at_a_time_as_fit() -> None:
    assert planned(46 * MIB, 2000 * MIB).at_once == 2
    found = planned(26 * MIB, 2000 * MIB)
    assert found.at_once == 1
    assert [group for sweep in found.sweeps for group in sweep.groups] == [(0,), (1,), (2,), (3,)]
    assert found.price.memory <= 26 * MIB


def test_a_small_disk_makes_the_teacher_run_for_sets_of_students_or_for_parts_of_the_steps() -> None:
    whole = planned(46 * MIB, 2000 * MIB)
    assert (whole.kind, whole.at_once) == ("cached", 2) and whole.price.cache_disk > 0
    # Two students' checkpoints at a time and one run of the teacher for all four no longer fit.
    less = planned(46 * MIB, 155 * MIB)
    assert less.kind != "cached" and less.disk <= 155 * MIB < whole.disk
    assert less.price.passes > whole.price.passes
    assert less.price.seconds > whole.price.seconds
    # Runs for the first students need the teacher's first blocks alone.
    assert less.price.teacher_flops < less.price.passes * 10 * BLOCKS * 1e9


def test_recomputing_wins_where_the_disk_is_slow() -> None:
    # Memory that is left beside the students holds the calls of a few steps.
    slow = Speeds(flops=1e15, read=1e6, write=1e6)
    found = planned(110 * MIB, 4000 * MIB, slow, steps=40, calls=40)
    assert found.kind == "recomputed"
    assert found.price.cache_disk == 0
    assert {name for name, _ in found.alternatives} >= {"cached"}
    windows = found.sweeps[0].windows
    assert windows[0][0] == 0 and windows[-1][1] == 40
    assert all(a[1] == b[0] for a, b in pairwise(windows))


def test_the_caches_memory_can_be_bounded_by_itself() -> None:
    students = [student(number) for number in range(4)]
    work = PricedWork([(0,), (1,)], [1.0, 1.0])
    limits = Capacity(1000 * MIB + MARGIN, 1000 * MIB, cache_memory=5 * MIB)
    price = Pricing(students, TEACHER, work, limits, EVEN).plan(0).price
    assert price.cache_memory == 5 * MIB
    assert price.cache_disk == 2 * (15 * MIB + 4096) - 5 * MIB


def test_the_choice_is_the_fastest() -> None:
    for memory in (26, 60, 200, 400):
        found = planned(memory * MIB, 3000 * MIB)
        assert all(found.price.seconds * CLEARLY <= price.seconds for _, price in found.alternatives)
        assert found.price.memory <= memory * MIB


def test_what_cannot_fit_is_refused_with_what_is_missing() -> None:
    with pytest.raises(PpclError, match=r"^--memory-limit: too small by 5\.0 MiB for the largest student"):
        planned(20 * MIB, 1000 * MIB)
    with pytest.raises(PpclError, match=r"^--disk-limit 1\.0 MiB: too small .* give at least "):
        planned(1000 * MIB, MIB)


def test_call_sizes_count() -> None:
    even = PricedWork([(0,), (1,)], [1.0, 1.0])
    uneven = PricedWork([(0,), (1,)], [1.0, 3.0])
    limits = Capacity(1000 * MIB + MARGIN, 1000 * MIB)
    prices = [Pricing([student(0)], TEACHER, work, limits, EVEN).plan(0).price for work in (even, uneven)]
    assert prices[1].training_flops == 2 * prices[0].training_flops
    assert prices[1].cache_memory == 2 * prices[0].cache_memory


def test_held_out_calls_are_cached_and_their_evaluations_priced() -> None:
    order = [(step % 8,) for step in range(20)]
    work = PricedWork(order, [1.0] * 10, held_out=(8, 9), evaluate_every=15)
    assert (work.evaluations(0, 20), work.evaluations(0, 14), work.evaluations(15, 20)) == (2, 0, 1)
    assert work.calls(0, 2) == [0, 1]
    assert work.calls(13, 15) == [5, 6, 8, 9]
    students = [student(number) for number in range(4)]
    price = Pricing(students, TEACHER, work, Capacity(1000 * MIB + MARGIN, 1000 * MIB), EVEN).plan(0).price
    assert price.cache_memory == 10 * (15 * MIB + 4096)
    assert price.teacher_flops == 10 * BLOCKS * 1e9
    # A forward pass is a third of a step: two evaluations on two calls.
    assert price.training_flops == pytest.approx((20 + 4 / 3) * 4e9)


def test_8_bit_moments_and_averages_are_counted() -> None:
    assert moment_bytes(2**16, "adamw") == 8 * 2**16
    assert moment_bytes(2**16, "adamw8bit") == 2 * 2**16 + 2 * 4 * 256 + 2048
    assert moment_bytes(4095, "adamw8bit") == 8 * 4095
