"""What each rank gets: edits by cost, samples of a batch; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppcl_fx.calls.store import Call, Calls, collate
from ppcl_fx.errors import PpclError
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.batches import Batches
from ppcl_fx.train.core.distillation_graph import distil, train_only
from ppcl_fx.train.core.stages import Distillation
from ppcl_fx.train.distributed import consensus
from ppcl_fx.train.distributed.batch_split import SplitBatch, cut, portion
from ppcl_fx.train.distributed.edit_parallel import assign, division_cost
from ppcl_fx.train.distributed.process_group import ProcessGroup, collective, current, joined
from tests.models import flux_kwargs, qwen_kwargs
from tests.train.pluggable import build

pytestmark = pytest.mark.slow


def _graph(stage: str = "depth") -> Any:
    model, _ = build()
    train_only(model, stage)
    return model, distil(model, stage)


@pytest.mark.parametrize("stage", ["depth", "width"])
def test_the_division_of_the_edits_is_the_best_of_all_runs(stage: str) -> None:
    _, graph = _graph(stage)
    edits = [share for shares in assign(graph, 1) for share in shares]
    for world in (1, 2, 3):
        shares = assign(graph, world)
        assert [edit for share in shares for edit in share] == edits
        assert len(shares) == min(world, len(edits))
        cuts = itertools.combinations(range(1, len(edits)), len(shares) - 1)
        others = [[edits[low:high] for low, high in itertools.pairwise((0, *places, len(edits)))] for places in cuts]
        assert division_cost(graph, shares) == min(division_cost(graph, other) for other in others)


def test_a_share_runs_the_teacher_only_as_far_as_it_needs_it() -> None:
    model, whole = _graph()
    first, last = assign(whole, 2)
    blocks = {}
    for share in (first, last):
        graph = distil(model, "depth", only=share)
        assert list(Distillation(model, "depth", Weights(), only=share).groups) == share
        called = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
        blocks[share[0]] = {t.split(".")[1] for t in called if t.startswith("transformer_blocks.")}
    assert blocks[first[0]] == {"0", "1"}
    assert blocks[last[0]] == {"0", "1", "2", "3"}
    with pytest.raises(PpclError, match="no edit 'depth:transformer_blocks.0-2'"):
        distil(model, "depth", only=["depth:transformer_blocks.0-2"])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kwargs", [qwen_kwargs, flux_kwargs])
def test_the_shares_of_a_batch_are_the_batch(world: int, kwargs: Any) -> None:
    calls = Calls([Call(kwargs(seed=i), (), 0.5, i, len(kwargs(seed=i)["timestep"])) for i in range(2)])
    whole = collate(list(calls))
    shares = [Batches(calls, 2, 0, ranks=ProcessGroup(rank, world), split=True).kwargs(0) for rank in range(world)]
    order = Batches(calls, 2, 0, ranks=ProcessGroup(0, world), split=True).indices(0)
    whole = collate([calls[i] for i in order])
    counted = [share for share in shares if isinstance(share, SplitBatch) and share.samples]
    total = len(whole["timestep"])
    assert sum(share.samples for share in counted) == total
    assert {share.total for share in counted} == {total}
    assert max(s.samples for s in counted) - min(s.samples for s in counted) <= 1
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        assert torch.equal(torch.cat([share[name] for share in counted]), whole[name])
    for share in shares:
        assert share.keys() == whole.keys()
        assert len(share["hidden_states"]) >= 1, "a rank without a share takes part with one sample"
        if "img_shapes" in whole:
            assert len(share["img_shapes"]) == len(share["hidden_states"])
        if "img_ids" in whole:
            assert torch.equal(share["img_ids"], whole["img_ids"])


def test_shares_cover_the_batch_without_overlap() -> None:
    for total, world in itertools.product(range(1, 9), range(1, 6)):
        found = [portion(total, ProcessGroup(rank, world)) for rank in range(world)]
        assert all(low < high for low, high, _ in found), "a rank without a share takes part with one sample"
        own = [(low, high) for low, high, counted in found if counted]
        assert [number for low, high in own for number in range(low, high)] == list(range(total))
        assert {counted for _, _, counted in found} <= {total // world, total // world + 1}
    calls = [Call(qwen_kwargs(seed=i), (), 0.5, i, 2) for i in range(3)]
    assert [call.batch for call in cut(calls, 1, 4)] == [1, 2]
    assert cut(calls, 2, 4)[0] is calls[1]


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert current() == ProcessGroup()
    with joined() as ranks:
        assert (ranks.alone, ranks.first) == (True, True)
        assert ranks.from_first("x") == "x"
        assert ranks.any(True)
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not; start with torchrun or accelerate launch"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is set and MASTER_ADDR is not"),
        ({"WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many', not a number"),
    ],
)
def test_an_incomplete_environment_is_refused(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PpclError, match=reason), joined():
        raise AssertionError("joined")


def test_communication_errors_become_a_line_and_others_stay() -> None:
    text = "[/pytorch/gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:1234"
    with pytest.raises(PpclError, match=r"lost or does not answer \(Connection closed by peer"), collective():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="^shapes differ$"), collective():
        raise RuntimeError("shapes differ")


def test_what_only_one_process_can_do_is_refused(tmp_path: Path) -> None:
    from ppcl_fx.train.config import resolve

    two = ProcessGroup(0, 2)
    for options, scored, reason in (
        ({"sequential": True}, False, "sequential distillation"),
        ({"optimizer": "adamw8bit"}, False, "adamw8bit does not know sharded parameters"),
        ({}, True, "cannot be scored"),
    ):
        with pytest.raises(PpclError, match=reason):
            consensus.refuse_on_ranks(two, resolve(**options), scored)
        consensus.refuse_on_ranks(ProcessGroup(), resolve(**options), scored)
    consensus.refuse_on_ranks(two, resolve(), False)


def test_a_plan_of_one_edit_gives_one_share() -> None:
    model, _ = build()
    plan = Plan(edits=[edit for edit in model.plan.edits if isinstance(edit, DepthEdit)][:1])
    assert len(plan.edits) == 1
    _, graph = _graph()
    assert len(assign(graph, 8)) == 2
