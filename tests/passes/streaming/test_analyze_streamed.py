"""The streamed analysis: the same numbers as the unstreamed one, resumable, in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.spill import Spill
from ppcl_fx.ir.tensor_codec import Encoded, decode, encode
from ppcl_fx.model.sources import open_source
from ppcl_fx.passes.analysis import analyze as analysis
from ppcl_fx.passes.analysis.analyze import analyze, analyze_streamed
from ppcl_fx.passes.calibration import calibration
from ppcl_fx.passes.calibration.calibration import Calibration, silent
from ppcl_fx.passes.calibration.reservoir import Reservoir, ranks
from ppcl_fx.passes.options import AnalyzeConfig
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import Checkpoint
from tests import models

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NAMES = ["qwen", "flux", "sd3"]
BUILD: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "qwen": models.tiny_qwen,
    "flux": models.tiny_flux,
    "sd3": models.tiny_sd3,
}


@functools.cache
def teacher(name: str) -> tuple[nn.Module, Calls]:
    """A small model, and four calls of it of two shapes."""
    model, kwargs = BUILD[name]()
    scaled = {**kwargs, "hidden_states": 0.5 * kwargs["hidden_states"]}
    every = [kwargs, models.other_kwargs(model), scaled, models.other_kwargs(model)]
    calls = [Call(k, ("a prompt",), 0.5, i, len(k["hidden_states"])) for i, k in enumerate(every)]
    return model, Calls(calls, fingerprint(model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in shards."""
    root = tmp_path_factory.mktemp("sharded")
    for name in NAMES:
        teacher(name)[0].save_pretrained(root / name, max_shard_size="200KB")  # type: ignore[operator]
    return {name: root / name for name in NAMES}


def checkpoint(folder: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    return open_source(str(folder)).checkpoint(dtype)


def begun(teacher: Checkpoint, calls: Calls, work: Path, samples: int) -> Calibration:
    return analysis.calibration_on_disk(teacher, calls, work, AnalyzeConfig(samples=samples), 2**32, silent)


def numbers(value: Any) -> list[float]:
    """Every number of an analysis, in order."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return [-1.0 if value is None else float(bool(value))] if not isinstance(value, str) else []
    if isinstance(value, int | float):
        return [float(value)]
    return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]


def alike(a: Redundancy, b: Redundancy) -> bool:
    one, two = numbers(a.model_dump()), numbers(b.model_dump())
    return len(one) == len(two) and one == pytest.approx(two, rel=0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [2**62, 0])
def test_a_streamed_run_computes_what_the_model_computes(
    name: str, budget: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, calls = teacher(name)
    mine = checkpoint(folders[name])
    gm = trace(mine.model, calls.examples())
    executor = Executor(gm, lambda _: [], Residency(CPU, mine.tensor, Spill(tmp_path, budget, CPU)))
    results: dict[int, Any] = {}
    for sweep in executor.sweeps:
        arguments = (call.kwargs for call in calls)
        executor.run(sweep, arguments, end=lambda call, result: results.update({call: result}))
        assert all(parameter.is_meta for parameter in gm.parameters())
    assert len(executor.sweeps) == 1 + len(gm.meta["ppcl"]["blocks"])
    for position, call in enumerate(calls):
        with torch.no_grad():
            assert torch.equal(results[position][0], model(**call.kwargs)[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", [2**32, 60_000])
def test_the_streamed_analysis_gives_the_same_numbers(
    name: str, memory: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, calls = teacher(name)
    plain = analyze(trace(model, calls.examples()), calls, AnalyzeConfig(refine_steps=3), memory=memory)
    found = analyze_streamed(checkpoint(folders[name]), calls, tmp_path / "work", memory=memory, refine_steps=3)
    assert found == plain  # to the bit
    assert found.samples_used == plain.samples_used == (10 if memory == 2**32 else plain.samples_used) >= 1
    assert (found.model, found.calls) == (plain.model, plain.calls)
    assert not (tmp_path / "work").exists()


def test_values_that_do_not_fit_are_spilled(folders: dict[str, Path], tmp_path: Path) -> None:
    model, calls = teacher("qwen")
    spilled: list[bool] = []
    original = Spill.spilled

    def note(self: Spill, cut: int) -> bool:
        spilled.append(original(self, cut))
        return spilled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spill, "spilled", note)
        patch.setattr(analysis, "state_budget", lambda *args: 3000)
        found = analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "work", memory_limit=1)
    assert spilled == [True] * 6
    assert alike(found, analyze(trace(model, calls.examples()), calls))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_killed_run_goes_on_where_it_was(
    stop: int, seconds: float, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, calls = teacher("qwen")
    monkeypatch.setattr(calibration, "CHECKPOINT_SECONDS", seconds)
    begun(checkpoint(folders["qwen"]), calls, tmp_path / "work", samples=5).run(stop)
    again = begun(checkpoint(folders["qwen"]), calls, tmp_path / "work", samples=5)
    assert again.store.cut == (stop if seconds == 0.0 or stop == 7 else 0)
    steps: list[int] = []
    found = analyze_streamed(
        checkpoint(folders["qwen"]),
        calls,
        tmp_path / "work",
        samples=5,
        memory=2**32,
        report=lambda done, total, label="": steps.append(done),
    )
    whole = analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "other", samples=5, memory=2**32)
    assert found == whole
    assert found.samples_used == 5


def test_killed_while_the_curves_are_made(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, calls = teacher("qwen")
    whole = analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "other")

    class Killed(Exception):
        pass

    written: list[str] = []

    def die(path: Path, *rest: Any, **named: Any) -> None:
        write(path, *rest, **named)
        written.append(path.name)
        if path.parent.name == "curves" and written.count(path.name) == 1:
            raise Killed

    from ppcl_fx.passes.calibration import run_store

    write = run_store.write_safetensors
    monkeypatch.setattr(run_store, "write_safetensors", die)
    for _ in range(2):
        with pytest.raises(Killed):
            analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "work")
    assert analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "work") == whole


def test_another_analysis_is_not_gone_on_with(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, calls = teacher("qwen")
    monkeypatch.setattr(calibration, "CHECKPOINT_SECONDS", 0.0)
    mine = checkpoint(folders["qwen"])
    begun(mine, calls, tmp_path, samples=5).run(2)
    with pytest.raises(PpclError, match=r"unfinished analysis of another samples \(5, here 6\)"):
        begun(mine, calls, tmp_path, samples=6)


def test_a_limit_that_is_too_small_says_what_is_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    _, calls = teacher("qwen")
    with pytest.raises(PpclError, match=r"--memory-limit 1.0 MiB: too small .* give at least \d"):
        analyze_streamed(checkpoint(folders["qwen"]), calls, tmp_path / "work", memory_limit=2**20)
    assert not (tmp_path / "work").exists()


def test_calls_of_another_model_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PpclError, match="recorded from another model"):
        analyze_streamed(checkpoint(folders["qwen"]), teacher("flux")[1], tmp_path / "work")


def test_calls_of_several_kinds_give_what_one_graph_for_both_gives(folders: dict[str, Path], tmp_path: Path) -> None:
    model, calls = teacher("qwen")
    masked = models.qwen_kwargs(mask=True)
    both = Calls([*calls, Call(masked, ("x",), 0.5, 4, 2)], calls.model)
    streamed = analyze_streamed(checkpoint(folders["qwen"]), both, tmp_path / "work")
    gm = trace(model, both.examples())
    assert gm.meta["ppcl"]["ones"] and not gm.meta["ppcl"]["kinds"]
    assert alike(streamed, analyze(gm, both)) and not alike(streamed, analyze(gm, calls))


def test_nan_is_refused_and_names_no_result(folders: dict[str, Path], tmp_path: Path) -> None:
    _, calls = teacher("qwen")
    bad = {**calls[0].kwargs, "hidden_states": calls[0].kwargs["hidden_states"] * float("nan")}
    with pytest.raises(PpclError, match="NaN or infinity"):
        analyze_streamed(
            checkpoint(folders["qwen"]), Calls([*calls, Call(bad, ("x",), 0.5, 4, 2)]), tmp_path / "work"
        )


def by_hand(samples: int, memory: int, sizes: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """What a reservoir keeps: the samples come one after the other, and the highest ranks go until the rest fits."""
    rank = {(call, row): ranks(call, 4)[row] for call, row in sizes}
    kept: list[tuple[int, int]] = []
    ceiling = 1.0
    for sample in sizes:
        if rank[sample] >= ceiling:
            continue
        kept.append(sample)
        while len(kept) > 1 and (len(kept) > samples or sum(sizes[one] for one in kept) > memory):
            worst = max(kept, key=lambda one: rank[one])
            kept.remove(worst)
            ceiling = rank[worst]
    return kept


def test_the_choice_is_a_reservoirs_and_never_smaller_with_part_of_the_sizes() -> None:
    for samples, memory in ((5, 10**6), (80, 700), (80, 1), (1, 10**6)):
        whole, part, mixed = (Reservoir(samples, memory) for _ in range(3))
        sizes = {(call, row): 15 + 7 * (call % 3) for call in range(20) for row in range(4)}
        for call in range(20):
            part.note(call, 4, 10 + 7 * (call % 3))
            whole.note(call, 4, 10 + 7 * (call % 3))
            # As where a call goes through all stacks before the next.
            mixed.note(call, 4, 10 + 7 * (call % 3))
            mixed.note(call, 4, 5)
        for call in range(20):
            whole.note(call, 4, 5)
        assert whole.kept() == mixed.kept() == by_hand(samples, memory, sizes)
        assert set(whole.kept()) <= set(part.kept())


def test_the_tensor_codec_keeps_values_and_what_they_share(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    values = [
        base[1:3],
        base.T[2],
        base.view(torch.int32)[3],
        torch.ones(1).expand(3, 5),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.bfloat16),
        (1, 2.5, "a", None, True, torch.Size([2, 3]), torch.float16, slice(None, 3), {"k": [base[0]], 2: ()}),
    ]
    encoded = encode(values)
    encoded.write(tmp_path / "encoded.safetensors")
    for found in (decode(encoded, CPU), decode(Encoded.read(tmp_path / "encoded.safetensors"), CPU)):
        for mine, theirs in zip(found[:7], values[:7], strict=True):
            assert (
                torch.equal(mine, theirs) and mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
            )
        assert found[7][:8] == values[7][:8] and torch.equal(found[7][8]["k"][0], base[0])
    found[0][0, 0] = 99.0  # the row and the column share this entry's neighbour; the int view another
    assert (
        found[1][1] == base.T[2][1] and found[0].untyped_storage()._cdata == found[1].untyped_storage()._cdata
    )
    with pytest.raises(RuntimeError, match="set crosses two blocks"):
        encode([{1, 2}])


def test_a_small_part_does_not_keep_the_whole() -> None:
    whole = torch.zeros(10**6)
    assert encode([whole[:10]]).nbytes < 1000
