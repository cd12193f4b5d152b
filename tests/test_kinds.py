"""One recording, several kinds of call: a missing mask is a mask of ones where the model says so, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppcl_fx
from ppcl_fx import EngineTransformer
from ppcl_fx.calls.examples import build_call, describe
from ppcl_fx.calls.kinds import Examples, kind_of, ones_in
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import GuardError
from ppcl_fx.export import ExportConfig, export
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.model.sources import open_source
from ppcl_fx.passes.analysis.analyze import analyze_streamed
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.tracing import bind, trace
from ppcl_fx.train import train
from ppcl_fx.train.bounded.trainer import BoundedTraining
from ppcl_fx.train.config import TrainConfig
from tests import models, toys

pytestmark = pytest.mark.slow

MASK = "encoder_hidden_states_mask"
ONES = {MASK: [("encoder_hidden_states", 0), ("encoder_hidden_states", 1)]}
STACK = "transformer_blocks"
PLAN = Plan(edits=[DepthEdit(stack=STACK, first=1, last=2), FfnEdit(stack=STACK, block=3)])


def qwen_calls(*kinds: tuple[bool, int, int]) -> tuple[nn.Module, Calls]:
    """Qwen-Image and a call for each kind: with a mask or without, so many samples, so many text tokens."""
    model, _ = models.tiny_qwen(blocks=4)
    calls = []
    for index, (mask, batch, text) in enumerate(kinds):
        kwargs = models.qwen_kwargs(batch=batch, text=text, seed=index, mask=mask)
        given = {name: value for name, value in kwargs.items() if value is not None}
        calls.append(Call(given, tuple(f"{index}.{i}" for i in range(batch)), 0.5, index, batch))
    return model, Calls(calls, fingerprint(model))


MIXED = ((True, 2, 5), (False, 1, 4), (True, 2, 7), (False, 2, 5))


def answer(model: Any, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**kwargs)[0]
    return result


@pytest.mark.parametrize("first", [0, 1])
def test_one_trace_serves_calls_with_a_mask_and_without_to_the_bit(first: int) -> None:
    model, calls = qwen_calls(*MIXED[first:], *MIXED[:first])
    assert len({kind_of(call.kwargs) for call in calls}) == 2
    gm = trace(model, calls.examples())
    assert MASK in gm.meta["ppcl"]["inputs"] and gm.meta["ppcl"]["ones"] == {MASK: (ONES[MASK], torch.bool)}
    for call in calls:
        assert torch.equal(answer(gm, bind(gm, call.kwargs)), answer(model, call.kwargs))
    filled = bind(gm, calls[1 - first].kwargs)[MASK]
    assert filled.shape == (1, 4) and filled.dtype == torch.bool and bool(filled.all())


def test_a_trace_of_one_kind_takes_no_other() -> None:
    model, calls = qwen_calls(*MIXED)
    gm = trace(model, calls[0].kwargs)
    with pytest.raises(GuardError, match="'encoder_hidden_states_mask' was given while tracing and is missing now"):
        bind(gm, calls[1].kwargs)


class NeedsAMask(toys.Toy):
    """Takes a missing mask for something else than ones: half of them."""

    def forward(self, x: Tensor, mask: Tensor | None = None, return_dict: bool = True) -> Any:
        """Weigh each token."""
        weights = torch.full(x.shape[:2], 0.5) if mask is None else mask.to(x.dtype)
        return super().forward(x * weights[..., None], return_dict)


class TakesOnes(toys.Toy):
    """Takes a missing mask for ones."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """Weigh each token, and add what may be given."""
        x = x if mask is None else x * mask[..., None].to(x.dtype)
        return super().forward(x if scale is None else x + scale[:, None, None], return_dict)


def kinds(*calls: dict[str, Any]) -> Examples:
    return Calls([Call(kwargs, ("a",), 0.5, i, len(kwargs["x"])) for i, kwargs in enumerate(calls)]).examples()


def test_what_the_model_tells_apart_is_not_filled_in() -> None:
    plain = {**toys.example(3, 6), "return_dict": False}
    masked = {**plain, "mask": torch.ones(3, 6)}
    examples = kinds(plain, masked)
    assert ones_in(examples, toys.build(NeedsAMask)) == {}
    assert ones_in(examples, toys.build(TakesOnes)) == {"mask": [("x", 0), ("x", 1)]}
    none = {**plain, "mask": None, "scale": None}
    assert ones_in(kinds(none, masked), toys.build(TakesOnes)) == {"mask": [("x", 0), ("x", 1)]}, "None is missing"
    half = {**plain, "mask": torch.full((3, 6), 0.5)}
    assert ones_in(kinds(plain, half), toys.build(TakesOnes)) == {}, "not a mask"
    added = {**masked, "scale": torch.ones(3)}
    assert ones_in(kinds(plain, added), toys.build(TakesOnes)) == {"mask": [("x", 0), ("x", 1)]}, "scale adds ones"


def test_the_shape_of_the_ones_is_told_by_all_calls() -> None:
    def call(batch: int, tokens: int, mask: bool) -> dict[str, Any]:
        given = {**toys.example(batch, tokens), "return_dict": False}
        return {**given, "mask": torch.ones(batch, tokens)} if mask else given

    model = toys.build(TakesOnes)
    # As many samples as tokens, and as many tokens as channels: what is dimension 1 of the mask is that of the input.
    assert ones_in(kinds(call(6, 6, True), call(2, 6, False)), model) == {"mask": [("x", 0), ("x", 1)]}
    assert ones_in(kinds(call(2, toys.WIDTH, True), call(3, 5, False)), model) == {"mask": [("x", 0), ("x", 1)]}
    # The mask of the other calls follows from nothing that every call has.
    other = {**call(2, 6, False), "mask": torch.ones(2, 1)}
    assert ones_in(kinds(other, call(2, 5, False)), model) == {"mask": [("x", 0), 1]}
    assert ones_in(kinds(call(2, 6, True), other, call(2, 5, False)), model) == {}


def test_a_recording_keeps_what_it_found(tmp_path: Path) -> None:
    from tests.small_pipelines import qwen

    pipeline, kwargs = qwen()
    kwargs["prompt_embeds_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    del kwargs["negative_prompt_embeds"], kwargs["true_cfg_scale"]
    calls = ppcl_fx.record(pipeline, ["a", "b", "c"], batch_size=2, num_inference_steps=2, **kwargs)
    assert [MASK in call.kwargs for call in calls] == [True, True, False, False]
    assert calls.ones == ONES and calls[1:].ones == ONES
    calls.save(tmp_path / "calls")
    opened = Calls.open(tmp_path / "calls")
    assert opened.ones == ONES and opened.fingerprint == calls.fingerprint
    # The weights are not there, so the model cannot be asked: the recording says it.
    meta = pipeline.transformer.to("meta")
    assert trace(meta, opened.examples()).meta["ppcl"]["ones"] == {MASK: (ONES[MASK], torch.int64)}


def test_a_description_of_a_call_says_which_arguments_are_ones() -> None:
    one = {"tensor": {"shape": [2, 5], "dtype": "int64", "ones": [["x", 0], 5]}}
    assert describe(torch.ones(2, 5, dtype=torch.long), [("x", 0), 5]) == one
    built = build_call({"mask": one, "x": describe(torch.ones(2, 5, 8))})
    assert built.ones == {"mask": [("x", 0), 5]} and built["mask"].shape == (2, 5)
    sizes: list[Any] = [["x", 0], [], 5, [2, 5], [None, 5]]
    sizes += [[["x", 0], wrong] for wrong in (True, 6, None, ["y", 1], ["x", -2], ["x", True], ["x", 3], ["x"])]
    for bad in sizes:
        with pytest.raises(ppcl_fx.PpclError, match="ones of an unknown shape"):
            build_call({"mask": {"tensor": {**one["tensor"], "ones": bad}}, "x": describe(torch.ones(2, 5, 8))})


@pytest.mark.usefixtures("translated_once")
def test_from_the_recording_to_the_engine(tmp_path: Path) -> None:
    teacher, calls = qwen_calls(*MIXED)
    teacher.save_pretrained(tmp_path / "teacher")  # type: ignore[operator]
    calls.ones = ones_in(calls.examples(), teacher)
    gm = trace(teacher, calls.examples())
    found = ppcl_fx.analyze(gm, calls)
    streamed = analyze_streamed(open_source(str(tmp_path / "teacher")).checkpoint(), calls, tmp_path / "work")
    assert found.calls_used == len(calls)
    assert streamed.stacks[0].streams["image"].fit == pytest.approx(found.stacks[0].streams["image"].fit, abs=1e-6)
    model = ppcl_fx.rewrite(gm, PLAN, calls)
    train(model, calls, out=tmp_path / "run", steps=(2, 2, 2), batch=1, tensorboard=False)
    model.plug(students=model.edits).save(tmp_path / "student")
    options = TrainConfig(stages=("depth", "width"), steps=(2, 2))
    BoundedTraining(tmp_path / "student", calls, options).run()
    loaded = ppcl_fx.load(tmp_path / "student")
    export(loaded, tmp_path / "engines", ExportConfig(keep=(1.0,), runs=1), calls=calls)
    engine = EngineTransformer(tmp_path / "engines", device="cpu")
    model.plug(students=[])
    loaded.plug(students=[])
    for call in calls:
        expected = answer(teacher, call.kwargs)
        assert torch.equal(answer(model, call.kwargs), expected)
        # Weights that lie elsewhere in memory are multiplied in another order.
        torch.testing.assert_close(answer(loaded, call.kwargs), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(answer(engine, call.kwargs), expected, rtol=0, atol=1e-5)
