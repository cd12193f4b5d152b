"""One pass over the teacher, and the analysis of three small models from it."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.calls.store import Call, Calls, hold_out
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.ir.executor import Executor
from ppcl_fx.ir.partition import Watch
from ppcl_fx.ir.sites import ffn_sites
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.passes.analysis.analyze import analyze
from ppcl_fx.passes.analysis.annotate import FfnFits, LinearProbes, Similarity, TextSimilarity
from ppcl_fx.passes.analysis.intervals import CandidateIntervals
from ppcl_fx.passes.analysis.similarity import linear_cka
from ppcl_fx.passes.calibration.calibration import calibrate
from ppcl_fx.passes.calibration.held_out import SHARE
from ppcl_fx.passes.calibration.reservoir import Reservoir
from ppcl_fx.passes.edits.plug import count
from ppcl_fx.passes.options import AnalyzeConfig
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.passes.selection.select import select
from ppcl_fx.schema.analysis import Interval, Redundancy
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models

Kwargs = dict[str, Any]
STACK = "transformer_blocks"


def _call(kwargs: Kwargs, index: int) -> Call:
    batch = len(kwargs["hidden_states"])
    return Call(kwargs, tuple(f"prompt {i}" for i in range(batch)), 0.5, index, batch)


def _calls(model: nn.Module, kwargs: Kwargs) -> Calls:
    """Four calls of two shapes: of each stream more tokens than channels, one call held out."""
    other = models.other_kwargs(model)
    every = [given | {"hidden_states": by * given["hidden_states"]} for by in (1.0, 0.5) for given in (kwargs, other)]
    return Calls([_call(k, i) for i, k in enumerate(every)], fingerprint(model))


@functools.cache
def _analysed(name: str) -> tuple[nn.Module, GraphModule, Calls, Redundancy]:
    """One of the small models, its graph, four calls and the analysis of all of their samples."""
    model, kwargs = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[name]()
    gm, calls = trace(model, kwargs), _calls(model, kwargs)
    return model, gm, calls, analyze(gm, calls)


def _result(executor: Executor, kwargs: Kwargs) -> Any:
    found: list[Any] = []
    executor.run(*executor.sweeps, [kwargs], end=lambda _, result: found.append(result))
    return found[0]


NAMES = pytest.mark.parametrize("name", ["qwen", "flux", "sd3"])


def _eager_outputs(model: nn.Module, kwargs: Kwargs, path: str) -> list[dict[str, Tensor]]:
    """Each block's outputs by hooks on the model itself; of the two tensors, the longer one is the image."""
    found: list[dict[str, Tensor]] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        two = sorted((t.detach() for t in output if t is not None), key=lambda t: t.shape[1])
        found.append({"image": two[-1], "text": two[0]})

    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    handles = [block.register_forward_hook(hook) for block in blocks]
    with torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return found


def test_watching_leaves_the_result_to_the_bit_and_sees_every_value(tiny: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny
    gm = trace(model, kwargs)
    seen: dict[str, Tensor] = {}
    found = stacks(gm)[0]
    watches = [
        Watch((block.inputs["image"], block.outputs["image"]), lambda a, b, p=block.path: seen.update({p: b}))
        for block in found.blocks
    ]
    for call in (kwargs, models.other_kwargs(model)):
        seen.clear()
        result = _result(Executor(gm, lambda _: watches), call)
        with torch.no_grad():
            assert torch.equal(result[0], model(**call)[0])
        eager = _eager_outputs(model, call, "transformer_blocks")[: len(found.blocks)]
        assert [
            torch.equal(seen[block.path], out["image"])
            for block, out in zip(found.blocks, eager, strict=True)
        ]
        assert all(
            torch.equal(seen[b.path], out["image"]) for b, out in zip(found.blocks, eager, strict=True)
        )
        assert not any(value.requires_grad for value in seen.values())


def test_watched_values_are_freed_after_their_last_watch(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    gm = trace(*tiny_qwen)
    nodes = [block.outputs["image"] for block in stacks(gm)[0].blocks]
    executor: Executor
    held: list[int] = []

    def count(*_: Any) -> None:
        (run,) = executor._runs.values()
        held.append(sum(node in run.env for node in nodes))

    watches = [Watch(pair, count) for pair in itertools.pairwise(nodes)]
    executor = Executor(gm, lambda _: watches)
    _result(executor, tiny_qwen[1])
    assert held == [2] * len(watches)


def test_a_call_of_another_kind_is_refused(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    calls = Calls([_call({**kwargs, "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool)}, 0)])
    with pytest.raises(GuardError, match="encoder_hidden_states_mask"):
        calibrate(trace(model, kwargs), calls)


def test_probe_fit_and_curves_are_those_of_the_eager_model(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    """Everything again from hooks on the model, with plain least squares and a loop over samples."""
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    calls = _calls(model, kwargs)
    calibration = calibrate(gm, calls, AnalyzeConfig(ridge=1e-5))
    assert calibration.samples_used == 2 + 3 + 2 + 3
    LinearProbes(calibration)(gm)
    Similarity(calibration)(gm)
    TextSimilarity(calibration)(gm)
    CandidateIntervals()(gm)
    outputs = [_eager_outputs(model, call.kwargs, "transformer_blocks") for call in calls]
    blocks = stacks(gm)[0].blocks
    for stream in ("image", "text"):
        parts = []
        for held in (False, True):
            part = [o for n, o in enumerate(outputs) if (n in hold_out(calls, SHARE, 0)) == held]
            parts.append([torch.cat([o[i][stream].flatten(0, 1) for o in part]).double() for i in range(len(blocks))])
        rows, apart = parts
        weights = []
        for i in range(1, len(blocks)):
            x, r = rows[i - 1], rows[i] - rows[i - 1]
            ridge = 1e-5 * float((x.T @ x).diagonal().mean())
            weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).double(), x.T @ r)
            weights.append(weight)
            x, r = apart[i - 1], apart[i] - apart[i - 1]
            fit = float((x @ weight - r).square().sum() / r.square().sum())
            assert blocks[i].outputs[stream].meta["ppcl"]["fit"] == pytest.approx(fit, rel=1e-2, abs=1e-6)
        u = 1
        for k in range(u + 1, len(blocks)):
            values, alike = [], []
            for output in outputs:
                for sample in range(len(output[u][stream])):
                    x = output[u][stream][sample].double()
                    for weight in weights[u:k]:
                        x = x + x @ weight
                    values.append(float(linear_cka(output[u][stream][sample][None], x[None])))
                    alike.append(
                        float(linear_cka(output[u][stream][sample][None], output[k][stream][sample][None]))
                    )
            meta = blocks[u].outputs[stream].meta["ppcl"]
            assert meta["cka"][k] == pytest.approx(sum(values) / len(values), abs=2e-5)
            assert meta["similarity"][k] == pytest.approx(sum(alike) / len(alike), abs=2e-5)
            assert meta["delta"][k] == pytest.approx(meta["cka"][k - 1] - meta["cka"][k])
            if stream == "text" and k == u + 1:
                between = blocks[k].outputs["text"].meta["ppcl"]["text_similarity"]
                assert between == pytest.approx(sum(alike) / len(alike), abs=2e-5)
    assert isinstance(blocks[0].outputs["image"].meta["ppcl"]["candidate"], Interval)


def test_ffn_fit_is_that_of_plain_least_squares(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    calls = _calls(model, kwargs)
    site = ffn_sites(gm, stacks(gm)[0].blocks[2])[0]
    pairs: list[tuple[Tensor, ...]] = []
    watches = [Watch((site.before, site.after), lambda *values: pairs.append(values))]
    executor = Executor(gm, lambda _: watches)
    executor.run(*executor.sweeps, (call.kwargs for call in calls))
    (held,) = hold_out(calls, SHARE, 0)
    apart = pairs.pop(held)

    def given(some: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (torch.cat([pair[i].flatten(0, 1) for pair in some]).double() for i in (0, 1))
        return x, y, torch.cat([x, torch.ones(len(x), 1).double()], dim=1)

    x, y, rows = given(pairs)
    solution = torch.linalg.lstsq(rows, y - x).solution
    x, y, rows = given([apart])
    made = x + rows @ solution
    FfnFits(calibrate(gm, calls))(gm)
    fit = site.after.meta["ppcl"]["ffn"]
    assert (fit.block, fit.stream) == (2, site.stream)
    assert fit.error == pytest.approx(float((made - y).square().sum() / (y - x).square().sum()), rel=1e-2)
    cosine = float((made * y).sum() / (made.norm() * y.norm()))
    assert fit.similarity == pytest.approx(cosine, abs=1e-5)


def test_passes_annotate_and_change_nothing(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    before = gm.graph.python_code("self").src
    found = analyze(gm, _calls(model, kwargs))
    assert gm.graph.python_code("self").src == before
    with torch.no_grad():
        out = gm(**{name: kwargs[name] for name in gm.meta["ppcl"]["inputs"]})
        assert torch.equal(out[0], model(**kwargs)[0])
    # The same numbers each time, from another graph of the same model.
    assert found == _analysed("qwen")[-1]


def test_measurements_of_another_graph_are_refused(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    calibration = calibrate(trace(model, kwargs), _calls(model, kwargs))
    other = trace(model, kwargs)
    for one in (pass_(calibration) for pass_ in (LinearProbes, Similarity, TextSimilarity, FfnFits)):
        with pytest.raises(PpclError, match="another graph"):
            one.requires(other)
    with pytest.raises(PpclError, match="run Similarity first"):
        CandidateIntervals().requires(other)


@NAMES
def test_analysis_has_every_stack_and_stream(name: str, tmp_path: Path) -> None:
    model, gm, _, found = _analysed(name)
    assert found.teacher_params == sum(p.numel() for p in model.parameters())
    assert (found.calls_used, found.samples_used, found.held_out) == (4, 10, "calls")
    assert found.few and all("a map of 32 channels from" in words for words in found.few)
    for stack, analysis in zip(stacks(gm), found.stacks, strict=True):
        assert analysis.name == stack.name
        assert analysis.blocks == [block.path for block in stack.blocks]
        assert list(analysis.streams) == list(stack.streams)
        for block, size in zip(stack.blocks, analysis.block_params, strict=True):
            assert size == sum(p.numel() for p in model.get_submodule(block.path).parameters())
        for curves in analysis.streams.values():
            assert all(0.0 <= value < math.inf for value in curves.fit)  # over 1: worse than no probe
            assert curves.cka[0][0] == 1.0
            for interval in curves.candidates:
                assert analysis.first <= interval.first < interval.last <= analysis.last
    # Nothing after the last block reads its text state.
    last = found.stacks[-1].streams
    assert {stream: curves.live for stream, curves in last.items()} == {s: s == "image" for s in last}
    found.save(tmp_path / "analysis.json")
    assert Redundancy.load(tmp_path / "analysis.json") == found


@NAMES
def test_plans_have_the_exact_parameter_count(name: str) -> None:
    _, gm, _, found = _analysed(name)
    for plan in (select(found, 0.6), select(found, 0.85), select(found, 0.7, select="uniform", width=False)):
        plan.check()
        assert plan.params == count(gm, plan) <= found.teacher_params


@pytest.mark.parametrize(
    "edits",
    [
        [FfnEdit(stack=STACK, block=0), FfnEdit(stack=STACK, block=5)],
        [TextStreamEdit(stack=STACK, source=2, last=5)],
        [
            TextStreamEdit(stack=STACK, source=0, last=2),
            FfnEdit(stack=STACK, block=2),
            FfnEdit(stack=STACK, block=4),
        ],
        [DepthEdit(stack=STACK, first=2, last=3), TextStreamEdit(stack=STACK, source=1, last=5)],
    ],
)
def test_savings_add_up_for_edits_together(edits: list[Edit]) -> None:
    _, gm, _, found = _analysed("qwen")
    assert found.teacher_params - saved(found, edits) == count(gm, Plan(edits=edits))


def test_nan_in_a_call_is_refused(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    bad = {**kwargs, "hidden_states": kwargs["hidden_states"] * float("nan")}
    seen: list[tuple[int, int]] = []
    with pytest.raises(PpclError, match="NaN or infinity"):
        analyze(
            trace(model, kwargs),
            Calls([_call(kwargs, 0), _call(bad, 1)]),
            progress=lambda *done: seen.append(done),
        )
    assert seen == [(1, 2)]


def test_bad_requests_are_refused(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    gm = trace(model, kwargs)
    with pytest.raises(PpclError, match="no calls"):
        analyze(gm, Calls([]))
    with pytest.raises(PpclError, match="did you mean 'image'"):
        analyze(gm, _calls(model, kwargs), AnalyzeConfig(stream="imgae"))
    with pytest.raises(PpclError, match="option samples: input should be greater than or equal to 1"):
        AnalyzeConfig(samples=0)
    with pytest.raises(PpclError, match="recorded from another model"):
        analyze(gm, Calls([_call(kwargs, 0)], "0" * 64))
    with pytest.raises(PpclError, match="no transformer blocks"):
        analyze(torch.fx.symbolic_trace(nn.Linear(2, 2)), _calls(model, kwargs))


def test_reservoir_is_bounded_and_does_not_depend_on_memory_for_its_order() -> None:
    def fill(samples: int, memory: int) -> list[tuple[int, int]]:
        kept = Reservoir(samples, memory)
        for call in range(20):
            kept.note(call, 4, 24)
        return kept.kept()

    five = fill(5, 10**6)
    assert len(five) == 5 and five == fill(5, 10**6) == sorted(five)
    assert len(fill(80, 10**6)) == 80
    # 24 bytes a sample: three fit, and they are three of the five.
    assert len(fill(5, 3 * 24)) == 3 and set(fill(5, 3 * 24)) < set(five)
    assert len(fill(5, 1)) == 1
    assert max(five)[0] > 10  # late calls have their chance


def test_samples_of_one_shape_are_batched(tiny_qwen: tuple[nn.Module, Kwargs]) -> None:
    model, kwargs = tiny_qwen
    calibration = calibrate(trace(model, kwargs), _calls(model, kwargs))
    site = calibration.streams[0]
    tokens = {len(kwargs["hidden_states"][0]): 4, len(models.other_kwargs(model)["hidden_states"][0]): 6}
    shapes = [[(len(t), t.shape[1]) for t in batch] for batch in calibration.batches(site)]
    assert shapes == [[(number, size)] * (len(site.outputs) + 1) for size, number in tokens.items()]


def test_graph_modules_without_our_trace_can_be_watched() -> None:
    gm: GraphModule = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    linear = next(iter(gm.graph.find_nodes(op="call_module", target="0")))
    seen: list[Tensor] = []
    x = torch.ones(1, 2)
    result = _result(Executor(gm, lambda _: [Watch((linear,), seen.append)]), {"input": x})
    assert torch.equal(result, seen[0].relu())
    with pytest.raises(PpclError, match="lacks the argument 'input'"):
        _result(Executor(gm, lambda _: []), {})
