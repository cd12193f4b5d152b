"""Prompts and pictures on two and on three ranks: divided work, one process's batches, one line for what is corrupt."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.train.data import cache
from ppcl_fx.train.data import prompts as module
from ppcl_fx.train.data import source as sources
from ppcl_fx.train.data.source import DistributedSource
from ppcl_fx.train.distributed import process_group
from ppcl_fx.train.distributed.batch_split import SplitBatch
from ppcl_fx.train.distributed.process_group import ProcessGroup
from ppcl_fx.train.images.encode import Encoder
from tests.train.sources.pictures import same, write_folder
from tests.train.sources.taught import pictures, prompts, trained
from tests.train.world import result, start

# Some builds of PyTorch come without it (macOS, a build of one's own).
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

PICTURES, PART, LIMIT = 21, 8, 0.05
STEPS = 6


class _Count:
    """How often something was called, and what is in the log."""

    def __init__(self) -> None:
        self.calls = 0
        self.lines: list[str] = []

    def spy(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def spied(*args: Any, **how: Any) -> Any:
            self.calls += 1
            return original(*args, **how)

        setattr(owner, name, spied)

    def listen(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ppcl_fx.train").addHandler(handler)


def two_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Train on prompts and on pictures; look at the batches; then at what is corrupt or refused."""
    cache.PART, sources.LIMIT = PART, LIMIT
    drawn, encoded = _Count(), _Count()
    drawn.spy(module, "record")
    encoded.spy(Encoder, "encode")
    encoded.listen()
    found: dict[str, Any] = {"prompts": trained(prompts(folder / "rec"), folder / "prompts", ["depth", "finetune"])}
    source = pictures(folder / "two")
    found["made"] = [drawn.calls, encoded.calls]
    found["pictures"] = trained(source, folder / "pictures", ["depth"])
    found["tuned"] = trained(source, folder / "tuned", ["finetune"])
    found["skipped"] = [line for line in encoded.lines if "is skipped" in line]
    found["batches"] = {"prompts": _batches(prompts(folder / "rec")), "pictures": _batches(source)}
    found["refused"] = _refused(folder, rank)
    sources.LIMIT = 4 * LIMIT
    encoded.lines.clear()
    hurt = pictures(folder / "hurt")
    shares = hurt.split()
    found["hurt"] = [_plain(shares.kwargs(step)) for step in range(len(hurt))]
    found["hurt names"] = sorted(hurt.skips.reasons)
    found["hurt lines"] = [line for line in encoded.lines if "is skipped" in line]
    return found


def _batches(source: DistributedSource) -> dict[str, Any]:
    """The first steps, whole and this rank's share of each, and what else is said of them."""
    shares = source.split()
    return {
        "fingerprint": source.fingerprint,
        "state": dict(source.state(STEPS - 1)),
        "whole": [source.kwargs(step) for step in range(STEPS)],
        "shares": [_plain(shares.kwargs(step)) for step in range(STEPS)],
        "said": [(feed.samples(step), feed.names(step)) for feed in (source, shares) for step in range(STEPS)],
    }


def _plain(share: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    assert isinstance(share, SplitBatch)
    return dict(share), share.samples, share.total


def _refused(folder: Path, rank: int) -> dict[str, str]:
    """Return the lines: a second corrupt picture, that rank 1 finds; what only rank 1 cannot do; other sources."""
    lines = {}
    spied = module.record

    def never(*_: Any, **__: Any) -> Any:
        raise PpclError("rank 1 cannot draw")

    for name, work in {
        "twice": lambda: pictures(folder / "twice"),
        "draw": lambda: prompts(folder / "never").kwargs(0),
        "alone": lambda: trained(prompts(folder / "rec", ranks=ProcessGroup()), folder / "x", ["depth"]),
        "bare": lambda: trained(_Bare(), folder / "x", ["depth"]),
    }.items():
        module.record = never if name == "draw" and rank == 1 else spied
        try:
            work()
        except PpclError as error:
            lines[name] = str(error)
    return lines


class _Bare:
    """A source that knows nothing of ranks."""

    fingerprint = "0" * 64


def three_ranks(folder: Path, rank: int) -> dict[str, Any]:
    """Go on with what two ranks began."""
    cache.PART, sources.LIMIT = PART, LIMIT
    return _gone_on(folder, 3)


def _gone_on(folder: Path, world: int) -> dict[str, Any]:
    where = folder / f"again-{world}"
    return {
        "prompts": trained(prompts(folder / "rec"), where / "prompts", ["depth", "finetune"], resume=True),
        "pictures": trained(pictures(folder / "two"), where / "pictures", ["depth"], resume=True),
    }


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Parts of a few pictures, of which one may be corrupt, so that a few are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "PART", PART)
        patch.setattr(sources, "LIMIT", LIMIT)
        yield


@pytest.fixture(scope="module")
def runs(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two ranks, and three that go on with what two began."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "two", "twice"):
        (folder / name).mkdir()
        data = write_folder(folder / name / "data", PICTURES)
        for bad in (7, 12) if name == "twice" else (7,):
            (data / f"{bad}.png").write_bytes(b"no picture")
    source = pictures(folder / "one")
    alone = {
        "prompts": trained(prompts(folder / "one"), folder / "one" / "prompts", ["depth", "finetune"]),
        "pictures": trained(source, folder / "one" / "pictures", ["depth"]),
        "tuned": trained(source, folder / "one" / "tuned", ["finetune"]),
    }
    torch.save(alone, folder / "one.pt")
    shutil.copytree(folder / "one", folder / "hurt")
    for tensors in (folder / "hurt" / "cache").glob("*/*/calls/calls-00000.safetensors"):
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 255  # in the last tensor, which is one picture's
        tensors.write_bytes(data)
    assert start(2, two_ranks, folder) == [(0, "")] * 2
    for world in (1, 3):
        for name, last in (("prompts", "01-00000004"), ("pictures", "00-00000004")):
            shutil.copytree(folder / name, folder / f"again-{world}" / name)
            shutil.rmtree(folder / f"again-{world}" / name / "checkpoints" / last)
    assert start(3, three_ranks, folder) == [(0, "")] * 3
    return folder


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["curves"].keys() == expected["curves"].keys()
    for stage, curves in expected["curves"].items():
        for edit, curve in curves.items():
            got = found["curves"][stage][edit]
            assert got == (curve if stage == "depth" else pytest.approx(curve, rel=1e-6)), (stage, edit)
    for name, tensor in expected["students"].items():
        assert torch.equal(found["students"][name], tensor), name
    for name, tensor in (found["tuned"] or {}).items():
        # AdamW divides by the gradient's size: where that is all rounding, so is the step.
        torch.testing.assert_close(tensor, expected["tuned"][name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["prompts", "pictures", "tuned"])
def test_two_ranks_give_what_one_process_gives(name: str, runs: Path) -> None:
    expected = torch.load(runs / "one.pt", weights_only=True)[name]
    for rank in range(2):
        _same(result(runs, two_ranks, 2, rank)[name], expected)


@pytest.mark.parametrize("name", ["prompts", "pictures"])
def test_three_ranks_and_one_go_on_from_two(name: str, runs: Path) -> None:
    expected = torch.load(runs / "one.pt", weights_only=True)[name]
    for rank in range(3):
        _same(result(runs, three_ranks, 3, rank)[name], expected)
    _same(_gone_on(runs, 1)[name], expected)


def test_the_ranks_divide_the_drawing_and_the_encoding(runs: Path) -> None:
    # Of five prompts in parts of four and of one, and of 21 pictures in parts of 8, 8 and 5.
    assert [result(runs, two_ranks, 2, rank)["made"] for rank in range(2)] == [[3, 13], [2, 8]]
    (recorded,) = (runs / "rec").iterdir()
    assert sorted(path.name for path in recorded.iterdir()) == ["part-00000", "part-00001"]


@pytest.mark.parametrize("name", ["prompts", "pictures"])
def test_every_rank_sees_the_batches_of_one_process_and_its_share_of_them(name: str, runs: Path) -> None:
    alone: Any = prompts(runs / "one") if name == "prompts" else pictures(runs / "one")
    assert isinstance(alone, DistributedSource)
    found = [result(runs, two_ranks, 2, rank)["batches"][name] for rank in range(2)]
    for mine in found:
        assert mine["fingerprint"] == alone.fingerprint
        assert mine["state"] == alone.state(STEPS - 1)
        assert mine["said"] == [(alone.samples(step), alone.names(step)) for step in range(STEPS)] * 2
        assert all(same(mine["whole"][step], alone.kwargs(step)) for step in range(STEPS))
    for step in range(STEPS):
        whole = alone.kwargs(step)
        _check_cut([mine["shares"][step] for mine in found], whole)
    last = alone.kwargs(STEPS - 1)
    alone.restore(found[1]["state"])
    assert same(alone.kwargs(STEPS - 1), last)


def _check_cut(shares: list[tuple[dict[str, Any], int, int]], whole: dict[str, Any]) -> None:
    """Assert that shares are a batch, cut in order."""
    assert {total for _, _, total in shares} == {sum(counted for _, counted, _ in shares)}
    own = [kwargs for kwargs, counted, _ in shares if counted]
    assert torch.equal(torch.cat([kwargs["hidden_states"] for kwargs in own]), whole["hidden_states"])
    assert torch.equal(torch.cat([kwargs["timestep"] for kwargs in own]), whole["timestep"])


def test_a_corrupt_picture_is_named_once(runs: Path) -> None:
    first, second = (result(runs, two_ranks, 2, rank)["skipped"] for rank in range(2))
    assert len(first) == 1
    assert "metadata.jsonl line 8 (7.png) is skipped (no picture that can be read" in first[0]
    assert second == []


def test_what_one_rank_finds_stops_all_with_one_line(runs: Path) -> None:
    first, second = (result(runs, two_ranks, 2, rank)["refused"] for rank in range(2))
    assert first["twice"].startswith("the pictures: 2 of 21 samples are corrupt, which is more than 1 %; the last is ")
    assert "13 (12.png)" in first["twice"]
    assert first["draw"] == "rank 1 cannot draw"
    assert first["alone"].startswith("the data was opened for 1 processes and 2 train on it")
    assert first["bare"].startswith("_Bare gives its data to one process")
    assert first == second


def test_a_damaged_sample_that_one_rank_reads_is_left_out_by_all(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LIMIT", 4 * LIMIT)
    alone = pictures(runs / "hurt")
    whole = [alone.kwargs(step) for step in range(len(alone))]
    assert sum(len(batch["timestep"]) for batch in whole) == PICTURES - 4
    first, second = (result(runs, two_ranks, 2, rank) for rank in range(2))
    assert first["hurt names"] == second["hurt names"] == sorted(alone.skips.reasons)
    assert len(first["hurt lines"]) == 4, "each is named once, by rank 0"
    assert second["hurt lines"] == []
    for shares, batch in zip(zip(first["hurt"], second["hurt"], strict=True), whole, strict=True):
        _check_cut(list(shares), batch)


def test_what_another_rank_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.time, "sleep", lambda _: (tmp_path / "late").mkdir())
    process_group.wait_for(tmp_path / "late", ProcessGroup(1, 2))
    monkeypatch.setattr(process_group, "SECONDS", -1.0)
    with pytest.raises(PpclError, match="rank 1 does not see it; keep the data on a disk that all ranks see"):
        process_group.wait_for(tmp_path / "never", ProcessGroup(1, 2))
