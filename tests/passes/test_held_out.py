"""Fits are judged on what they were not solved from, and too few tokens are said or refused, with what would do."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls, hold_out
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.ir.executor import Executor
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.passes.analysis.analyze import analyze_streamed
from ppcl_fx.passes.analysis.probes import NormalEquations
from ppcl_fx.passes.calibration.held_out import ENOUGH, Division, HeldOutFit
from ppcl_fx.passes.calibration.initialise import fit_projectors, projector_sites
from ppcl_fx.report import write_report
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.tracing import trace
from tests import models

WIDTH = 24
STACK = "transformer_blocks"


def recorded(model: nn.Module, number: int, **more: Any) -> Calls:
    """Return calls of different prompts; one has 2 x 16 image and 2 x 5 text tokens unless `more` says otherwise."""
    every = [models.qwen_kwargs(seed=seed, **more) for seed in range(number)]
    return Calls([Call(k, (f"p{i}",), 0.5, i, len(k["timestep"])) for i, k in enumerate(every)], fingerprint(model))


def analysed(number: int, **more: Any) -> Redundancy:
    model, _ = models.tiny_qwen(blocks=3)
    calls = recorded(model, number, **more)
    return ppcl_fx.analyze(trace(model, calls.examples()), calls)


def division(number: int, batch: int = 1) -> Division:
    return Division([Call({}, (f"p{i}",), 0.5, i, batch) for i in range(number)])


def fed(tokens: int, calls: int, noise: float) -> tuple[HeldOutFit, NormalEquations]:
    """Return the fits of a known map of `WIDTH` channels with noise: of calls with some held out, and of all tokens."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    parts = division(calls)
    fit, plain = HeldOutFit("it", parts), NormalEquations()
    for position in range(calls):
        parts.begin(position)
        x = torch.randn(tokens, WIDTH, generator=generator)
        y = x + x @ weight.T + noise * torch.randn(tokens, WIDTH, generator=generator)
        fit.add(x, y)
        plain.add(x, y)
    return fit, plain


def test_a_map_of_few_tokens_is_judged_by_others() -> None:
    """With 1.3 tokens a channel the tokens themselves are fitted well and others badly; with many, both well."""
    truth = 1 / 2  # half of the change is noise
    few, same = fed(tokens=8, calls=5, noise=1.0)
    assert few.error(few.solve()) > 2 * truth
    assert same.error(same.solve()) < truth / 2
    many, _ = fed(tokens=200, calls=10, noise=1.0)
    assert many.error(many.solve()) == pytest.approx(truth, rel=0.05)
    assert many.fit(many.solve()).error == many.error(many.solve())


def test_with_fewer_tokens_than_channels_they_are_fitted_and_others_say_so() -> None:
    """Below half as many the number would mean nothing, and there is none."""
    fit, same = fed(tokens=WIDTH // 4, calls=4, noise=1.0)
    assert same.error(same.solve(ridge=1e-12)) < 1e-6
    assert fit.error(fit.solve()) > 0.5
    assert fit.few == f"it: a map of {WIDTH} channels from 18 tokens is rough; record 22 calls like these, 4 were given"
    few, _ = fed(tokens=WIDTH // 4, calls=2, noise=1.0)
    wanted = rf"it: a map of {WIDTH} channels fits 6 tokens .*; record 22 calls like these, 2 were given"
    with pytest.raises(PpclError, match=wanted):
        few.solve()
    enough, _ = fed(tokens=WIDTH // 4, calls=22, noise=1.0)
    enough.solve()
    assert enough.few == ""


@pytest.mark.parametrize("tokens", [1, 5, 23, 24, 25, 60, 300])
@pytest.mark.parametrize("calls", [2, 3, 4, 7, 12, 30])
def test_the_number_of_calls_that_is_named_does(tokens: int, calls: int) -> None:
    def said(number: int) -> str:
        try:
            return fed(tokens, number, 1.0)[0].few
        except PpclError as error:
            return str(error)

    words = said(calls)
    if words:
        number = int(re.findall(r"record (\d+) calls", words)[0])
        assert number > calls
        assert said(number) == ""


def test_one_call_holds_out_samples_and_one_sample_tokens() -> None:
    x = torch.arange(10.0 * 4 * 3).reshape(10, 4, 3)
    alone = division(1, batch=10)
    assert alone.kind == "samples"
    (_, kept, _), (held, apart, _) = alone.parts(x, x)
    assert held and torch.equal(kept, x[:8]) and torch.equal(apart, x[8:])
    single = division(1)
    assert single.kind == "tokens"
    for given in (x[:1], x[0]):  # a feed-forward may see tokens without a batch
        (_, kept, _), (_, apart, _) = single.parts(given, given)
        assert torch.equal(apart, given.reshape(-1, 3)[::5])
        assert len(kept) + len(apart) == 4
    # One text for all samples stands for each of them.
    (_, kept, made), (_, apart, _) = alone.parts(x[:1], x)
    assert torch.equal(kept, x[:1].expand(8, 4, 3)) and torch.equal(made, x[:8]) and len(apart) == 2
    several = division(5)
    assert several.kind == "calls"
    held_ones = hold_out([Call({}, (f"p{i}",), 0.5, i, 1) for i in range(5)], 0.2, 0)
    for position in range(5):
        several.begin(position)
        ((held, whole, _),) = several.parts(x, x)
        assert held == (position in held_ones) and whole is x


def test_calls_of_a_prompt_are_held_out_together() -> None:
    calls = [Call({}, (f"p{i // 4}",), 0.5, i, 1) for i in range(40)]
    held = hold_out(calls, 0.2, 0)
    assert len(held) == 8
    assert {calls[i].prompts for i in held}.isdisjoint(calls[i].prompts for i in range(40) if i not in held)


def test_the_analysis_refuses_or_says_what_rests_on_few_tokens(caplog: pytest.LogCaptureFixture) -> None:
    stream = rf"stack {STACK}, text stream: a map of 32 channels"
    with pytest.raises(PpclError, match=rf"{stream} fits 10 tokens .*; record 18 calls like these, 2 were given"):
        analysed(2)
    with caplog.at_level(logging.WARNING, "ppcl_fx"):
        rough = analysed(6)
    assert re.match(rf"{stream} from 50 tokens is rough; record 18 calls like these, 6 were given", rough.few[0])
    assert caplog.messages == rough.few and len(rough.few) == 1
    enough = analysed(18)
    assert enough.few == [] and enough.held_out == "calls"
    # What is said of few tokens is worse than what many show, and never better.
    worst = [max(found.stacks[0].streams["text"].fit) for found in (rough, enough)]
    assert worst[0] > worst[1]


@pytest.mark.parametrize(("number", "batch", "kind"), [(1, 8, "samples"), (1, 1, "tokens"), (7, 2, "calls")])
def test_the_streamed_analysis_holds_out_the_same(number: int, batch: int, kind: str, tmp_path: Path) -> None:
    model, _ = models.tiny_qwen(blocks=3)
    calls = recorded(model, number, batch=batch, text=64 // batch, height=8, width=8)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    plain = ppcl_fx.analyze(trace(model, calls.examples()), calls)
    found = analyze_streamed(open_source(str(tmp_path / "model")).checkpoint(), calls, tmp_path / "work")
    assert found.held_out == plain.held_out == kind and found.few == plain.few
    for stream, curves in plain.stacks[0].streams.items():
        assert found.stacks[0].streams[stream].fit == curves.fit  # to the bit
    assert found.stacks[0].ffn == plain.stacks[0].ffn


def test_the_streamed_analysis_refuses_after_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.tiny_qwen(blocks=3)
    calls = recorded(model, 2)
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    ran: list[int] = []
    run_sweep = Executor.run

    def counted(self: Executor, sweep: range, *args: Any, **more: Any) -> None:
        ran.extend(sweep)
        run_sweep(self, sweep, *args, **more)

    monkeypatch.setattr(Executor, "run", counted)
    with pytest.raises(PpclError, match="record 18 calls like these"):
        analyze_streamed(open_source(str(tmp_path / "model")).checkpoint(), calls, tmp_path / "work")
    assert ran == [0, 1]


def test_analyses_of_before_open_and_the_report_says_how_fits_were_judged(tmp_path: Path) -> None:
    found = analysed(6)
    found.save(tmp_path / "new.json")
    assert Redundancy.load(tmp_path / "new.json") == found and found.version == 2
    old = json.loads((tmp_path / "new.json").read_text())
    old["version"] = 1
    del old["held_out"], old["few"], old["seal"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    before = Redundancy.load(tmp_path / "old.json")
    assert before.held_out is None and before.few == [] and before.stacks == found.stacks
    for analysis, words in ((found, "calls that were held out"), (before, "what they were solved from")):
        page = write_report(tmp_path / "report.html", redundancy=analysis, title="t").read_text()
        assert f"judged on {words}" in page
        assert all(line in page for line in analysis.few)


def projectors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.graph.state_dict().items() if name.startswith("projectors.")}


def test_projectors_are_not_fitted_to_few_tokens(caplog: pytest.LogCaptureFixture) -> None:
    teacher, kwargs = models.tiny_qwen()
    plan = Plan(edits=[DepthEdit(stack=STACK, first=2, last=3), FfnEdit(stack=STACK, block=2)])
    gm = trace(teacher, kwargs)
    wanted = r"projectors\.ffn_transformer_blocks_2\.text: a map of 32 channels fits 10 tokens .*; record 13 calls"
    with pytest.raises(PpclError, match=wanted):
        rewrite(gm, plan, recorded(teacher, 1))
    caplog.clear()
    model = rewrite(gm, plan, recorded(teacher, 13))
    assert caplog.messages == []
    # After a training: what has no tokens stays as it was, and a training that is done is not lost.
    before = projectors(model)
    assert all(site.in_student for site in projector_sites(model.graph))
    fit_projectors(model.graph, [call.kwargs for call in recorded(teacher, 1)], in_students=True)
    after = projectors(model)
    kept = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert kept == {name for name in before if ".text." in name}
    assert any("text: a map" in words and "stays as it was" in words for words in caplog.messages)
    assert any("image: a map of 32 channels from 32 tokens is rough" in words for words in caplog.messages)


def test_enough_is_what_the_words_count_with() -> None:
    fit, _ = fed(tokens=ENOUGH * WIDTH, calls=2, noise=1.0)
    assert fit.few == ""
    fit, _ = fed(tokens=ENOUGH * WIDTH - 1, calls=2, noise=1.0)
    assert fit.few.endswith("record 3 calls like these, 2 were given")
