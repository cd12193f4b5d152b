"""What is told of a run: rates from a clock that cannot jump, operations by formula, a log without lost work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.cli.terminal import watching, words
from ppcl_fx.errors import PpclError
from ppcl_fx.train.metrics import logger as module
from ppcl_fx.train.metrics.logger import EVENTS, LOG, Counter, LogRow, MetricsLogger


class Clock:
    """A clock that goes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _steps(watch: MetricsLogger, clock: Clock, numbers: range, seconds: float = 2.0, **facts: Any) -> None:
    given = {"losses": {"e": 0.5}, "lr": 0.1, "norms": {"e": 1.0}, "held_out": {}, "score": None, "stopped": {}}
    for number in numbers:
        with watch.step():
            torch.ones(2, 3) @ torch.ones(3, 4)
        spent = watch.stepped(samples=4)
        clock.now += seconds
        watch.row(number, spent, **{**given, **facts})


def test_rates_and_the_estimate_come_from_measured_steps() -> None:
    clock, rows = Clock(), list[LogRow]()
    watch = MetricsLogger(show=rows.append, clock=clock)
    watch.begin("depth", 0, 10)
    _steps(watch, clock, range(1, 2), seconds=60.0)  # warms up: not part of any rate
    _steps(watch, clock, range(2, 7))
    assert {(row.stage, row.steps) for row in rows} == {("depth", 10)}
    assert [row.left for row in rows[:3]] == [None] * 3
    assert rows[3].left == 2.0 * 6
    assert rows[5].left == 2.0 * 4
    assert rows[5].samples_per_second == 2.0
    assert rows[5].flops_per_second == 2 * 2 * 3 * 4 / 2.0
    assert rows[5].peak_bytes > 2**20
    watch.changed()
    _steps(watch, clock, range(7, 8), seconds=1.0)
    assert rows[6].left == 2.0 * 3, "the last known rate stands until there is a new one"
    _steps(watch, clock, range(8, 11), seconds=1.0)
    assert rows[9].samples_per_second == 4.0


def test_the_time_of_day_may_jump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    days = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(days)))
    rows: list[LogRow] = []
    watch = MetricsLogger(tmp_path, show=rows.append, tensorboard=False)
    watch.begin("depth", 0, 6)
    _steps(watch, Clock(), range(1, 7))
    assert all(0 <= row.seconds < 60 for row in rows)
    assert rows[-1].samples_per_second is not None
    assert rows[-1].samples_per_second > 0


def test_operations_are_counted_by_formula_and_change_nothing() -> None:
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    plain = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    with Counter() as counter:
        counted = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(plain, counted)
    assert counter.total == 2 * (2 * 2 * 4 * 6 * 6 * 8)
    linear = torch.nn.Linear(8, 5)
    with Counter() as counter:
        linear(query).sum().backward()
    rows = 2 * 4 * 6
    assert counter.total >= 3 * 2 * rows * 8 * 5, "forward, the input's gradient and the weight's"


def test_the_log_has_a_line_a_step_and_lost_work_goes(tmp_path: Path) -> None:
    clock = Clock()
    for label, done, numbers in (("depth", 0, range(1, 6)), ("depth", 3, range(4, 5)), ("width", 0, range(1, 2))):
        watch = MetricsLogger(tmp_path, tensorboard=False, clock=clock)
        watch.begin(label, done, 9)
        _steps(watch, clock, numbers)
        with (tmp_path / LOG).open("a", encoding="utf-8") as file:
            file.write('{"stage": "depth", "st')  # a killed run's last line
        watch.begin("other", 0, 1)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text(encoding="utf-8").splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        *[("depth", step) for step in (1, 2, 3, 4)],
        ("width", 1),
    ]
    assert rows[0]["losses"] == {"e": 0.5}
    assert rows[0]["time"].endswith("+00:00")


def test_a_full_disk_stops_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    watch = MetricsLogger(tmp_path, tensorboard=False)
    watch.begin("depth", 0, 3)
    monkeypatch.setattr(module, "append_regular", full)
    _steps(watch, Clock(), range(1, 4))
    assert caplog.text.count("the log cannot be written") == 1
    assert "No space left" in caplog.text


def test_events_are_written_where_tensorboard_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = MetricsLogger(tmp_path, tensorboard=True)
    watch.begin("depth", 0, 3)
    _steps(watch, Clock(), range(1, 4))
    watch.close()
    events = EventAccumulator(str(tmp_path / EVENTS / "depth")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("depth/loss/e")] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_without_tensorboard_asking_for_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert module._tensorboard(None) is None
    with pytest.raises(PpclError, match=r"pip install 'ppcl-fx\[train\]'"):
        MetricsLogger(tmp_path, tensorboard=True)


def _row(step: int, **changed: Any) -> LogRow:
    facts: dict[str, Any] = {
        "stage": "depth", "step": step, "steps": 1000, "loss": 0.25, "losses": {"e": 0.25}, "lr": 0.1, "norms": {},
        "held_out": {}, "score": None, "stopped": {}, "seconds": 1.0, "samples_per_second": 4.0,
        "flops_per_second": 3.2e12, "peak_bytes": 2**31, "left": 5400.0,
    }  # fmt: skip
    return LogRow(**{**facts, **changed})


def test_a_row_in_words() -> None:
    assert words(_row(7)) == (
        "depth: 7 of 1000, loss 0.25, 4 samples/s, 3.2 TFLOP/s, peak 2.00 GiB, about 90 min left in this stage"
    )
    early = words(_row(1, samples_per_second=None, flops_per_second=None, left=None, held_out={"e": 0.3}))
    assert early == "depth: 1 of 1000, loss 0.25, held-out 0.3, peak 2.00 GiB"


def test_without_a_terminal_there_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with watching(clock) as show:
        for step in range(1, 181):
            show(_row(step, stopped={"e": "it has converged"} if step == 50 else {}))
            clock.now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "depth: 1 of 1000",
        "depth: e stopped",
        "depth: 61 of 1000",
        "depth: 121 of 1000",
    ]
