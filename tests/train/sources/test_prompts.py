"""Prompts as data: recorded when training comes to them, once, and the same after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.calls.record import record
from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.train.data import prompts as module
from ppcl_fx.train.data.prompts import PromptSource, Recording
from ppcl_fx.train.data.source import DataSource
from tests.shapes_folder import save_pipeline

PROMPTS = ["a red circle", "a blue square", "two red circles", "a green circle", "a red square", "a blue circle"]
# Two prompts a part, one picture a call, two denoising steps: four calls, so two batches a part.
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
BATCHES = 2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ShapesPipeline:
    """A small random pipeline, quick enough to draw with."""
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline"), blocks=1)
    loaded: ShapesPipeline = ShapesPipeline.from_pretrained(folder)
    return loaded


def source(pipeline: Any, folder: Path, told: list[int] | None = None, **how: Any) -> PromptSource:
    """A source of two prompts a part; what is no field of a recording goes to the pipeline."""
    own = {name: how.pop(name) for name in ("part", "batch_size") if name in how}
    heard = None if told is None else told.append
    recording = Recording(**{"part": 2, **own}, told=heard, arguments={**ARGUMENTS, **how})
    return PromptSource(pipeline, PROMPTS, folder, 2, 0, recording=recording)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_a_part_is_recorded_when_training_comes_to_it_and_never_again(pipeline: Any, tmp_path: Path) -> None:
    told: list[int] = []
    prompts = source(pipeline, tmp_path, told)
    assert isinstance(prompts, DataSource)
    assert not any(tmp_path.iterdir())
    seen = []
    for step in range(3 * BATCHES):
        prompts.kwargs(step)
        seen.append(list(told))
    assert seen == [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]
    second = [prompts.kwargs(step) for step in range(3 * BATCHES, 6 * BATCHES)]
    assert told == [0, 1, 2]
    assert all(value["hidden_states"].shape[0] == 2 for value in second)


def test_a_killed_run_goes_on_with_the_same_tensors(pipeline: Any, tmp_path: Path) -> None:
    whole = [source(pipeline, tmp_path / "whole").kwargs(step) for step in range(9)]
    for step in range(9):  # a new process at each step
        told: list[int] = []
        state = torch.get_rng_state()
        assert same(source(pipeline, tmp_path / "killed", told).kwargs(step), whole[step])
        assert torch.equal(torch.get_rng_state(), state)
        assert told == ([step // BATCHES] if step < 6 and step % BATCHES == 0 else [])
    shutil.rmtree(tmp_path / "killed")
    assert same(source(pipeline, tmp_path / "killed").kwargs(8), whole[8])


def test_an_epoch_sees_each_call_once_and_the_next_in_another_order(pipeline: Any, tmp_path: Path) -> None:
    prompts = source(pipeline, tmp_path)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * 6, epoch * 6 + 6)
        epochs.append([row for step in steps for row in prompts.kwargs(step)["hidden_states"]])
        assert len({tuple(row.flatten().tolist()) for row in epochs[-1]}) == 12
    assert {tuple(row.flatten().tolist()) for row in epochs[0]} == {tuple(r.flatten().tolist()) for r in epochs[1]}
    assert not torch.equal(torch.stack(epochs[0]), torch.stack(epochs[1]))


def test_it_goes_on_from_a_state_within_a_part_without_the_parts_before(pipeline: Any, tmp_path: Path) -> None:
    whole = source(pipeline, tmp_path / "whole")
    expected = [whole.kwargs(step) for step in range(3 * BATCHES + 2)]
    state = whole.state(BATCHES + 1)
    assert state == {"seed": 0, "step": BATCHES + 1, "epoch": 0, "position": 1, "within": 1}
    told: list[int] = []
    later = source(pipeline, tmp_path / "later", told)
    later.restore(state)
    assert later.state(BATCHES + 1) == state
    for step in range(BATCHES + 1, len(expected)):
        assert same(later.kwargs(step), expected[step])
    assert told[:2] == [1, 2], "part 0 is first needed in the next epoch"
    with pytest.raises(PpclError, match="same prompts and seed"):
        later.restore({**state, "seed": 1})


def test_a_kill_within_a_part_costs_one_run_of_the_pipeline(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source(pipeline, tmp_path / "whole").kwargs(0)
    drawn: list[Any] = []

    def killed(*args: Any, **how: Any) -> Calls:
        drawn.append(args[1])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return record(*args, **how)

    monkeypatch.setattr(module, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        source(pipeline, tmp_path / "killed").kwargs(0)
    assert same(source(pipeline, tmp_path / "killed").kwargs(0), expected)
    assert len(drawn) == 3, "the first prompt is not drawn again"
    assert drawn[1] == drawn[2]
    (folder,) = (tmp_path / "killed").iterdir()
    assert [path.name for path in folder.iterdir()] == ["part-00000"]


def test_what_it_was_recorded_from_is_in_the_folder(pipeline: Any, tmp_path: Path) -> None:
    first = source(pipeline, tmp_path)
    first.kwargs(0)
    (folder,) = tmp_path.iterdir()
    assert folder.name == first.fingerprint[:16]
    calls = Calls.open(folder / "part-00000" / "calls")
    assert calls.model == fingerprint(pipeline.transformer)
    assert len(calls) == 4
    other = source(pipeline, tmp_path, num_inference_steps=1)
    assert other.fingerprint != first.fingerprint
    other.kwargs(0)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [({"part": 0}, "too few"), ({"batch_size": 0}, "too few")],
)
def test_what_cannot_work_is_refused(pipeline: Any, tmp_path: Path, how: dict[str, Any], reason: str) -> None:
    with pytest.raises(PpclError, match=reason):
        source(pipeline, tmp_path, **how)
    with pytest.raises(PpclError, match="no prompts to train on"):
        PromptSource(pipeline, [], tmp_path, 1, 0)
