"""The gate: files are compared with PyTorch on recorded calls and over whole sampling runs, or are not kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, SamplingRun, check_artefacts, export, one_graph
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.export.verify.metrics import Agreement, agreement, spread, worst
from ppcl_fx.io.files import write_json
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests import models
from tests.export import test_runtime_families as families

pytestmark = pytest.mark.slow

BLOCKS = "transformer_blocks"


# ---- measuring -------------------------------------------------------------------------------------------------


def test_numbers_of_one_result() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = expected + torch.tensor([[0.0, 0.3], [0.0, 0.0]])
    one = agreement(found, expected, "x")
    assert one.relative == pytest.approx(0.3 / 5) and one.max_abs == pytest.approx(0.3)
    assert one.cosine == pytest.approx(25 / (5 * math.sqrt(25 + 0.09)))
    same = agreement(expected, expected.clone(), "y")
    assert (same.relative, same.max_abs, same.cosine) == (0.0, 0.0, 1.0)
    assert agreement(-expected, expected, "z").cosine == -1.0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.full((2,), float("nan")), torch.ones(2)),
        (torch.full((2,), float("inf")), torch.full((2,), float("inf"))),
        (torch.ones(2), torch.zeros(2)),
    ],
)
def test_nonsense_is_never_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    one = agreement(found, expected, "x")
    assert one.relative == math.inf and one.cosine == 0.0
    assert not one.within(1e9) and not one.within(math.inf)
    assert agreement(torch.zeros(2), torch.zeros(2), "x").within(0.0)


def test_the_worst_of_several() -> None:
    near = agreement(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), "near")
    far = agreement(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0]), "far")
    both = worst([near, far, near])
    assert (both.compared, both.relative, both.cosine, both.worst) == (3, 0.5, far.cosine, "far")
    with pytest.raises(RuntimeError, match="nothing was compared"):
        worst([])


def test_calls_are_chosen_from_early_to_late() -> None:
    # Three runs of five steps with two branches each.
    times = [time for _ in range(3) for time in (1.0, 0.8, 0.6, 0.4, 0.2) for _ in range(2)]
    chosen = spread(times, 8)
    assert len(set(chosen)) == 8 and chosen == spread(times, 8)
    found = [times[index] for index in chosen]
    assert found == sorted(found, reverse=True) and set(found) == set(times)
    assert {index % 2 for index in chosen} == {0, 1} and len({index // 10 for index in chosen}) > 1
    assert spread(times, 1) == [0] and sorted(spread(times, 99)) == list(range(30))
    assert spread([], 8) == []


# ---- one small model, many gates -------------------------------------------------------------------------------


def recorded(kwargs: Callable[..., dict[str, Any]], count: int = 5) -> Calls:
    """Calls of one run, of two resolutions and text lengths in turn."""
    calls = []
    for index in range(count):
        given = kwargs(seed=index) if index % 2 else kwargs(batch=3, height=8, width=4, text=7, seed=index)
        calls.append(Call(given, ("a", "b"), 1.0 - index / count, index, len(given["hidden_states"])))
    return Calls(calls[1:] + calls[:1])


def student(teacher: torch.nn.Module, example: dict[str, Any], first: int) -> PluggableModel:
    plan = Plan(edits=[DepthEdit(stack=BLOCKS, first=first, last=first + 1)])
    model = ppcl_fx.rewrite(trace(teacher, example), plan).eval()
    return model.plug(students=model.edits)


def share(model: PluggableModel) -> float:
    """The share of the smallest mixture, a little more."""
    return math.ceil(1000 * model.param_count(model.edits) / model.teacher_params) / 1000


@pytest.fixture(scope="module")
def qwen() -> PluggableModel:
    """Three blocks; one edit makes a student of the first two."""
    teacher, kwargs = models.tiny_qwen(blocks=3)
    return student(teacher, kwargs, 0)


@pytest.fixture(scope="module")
def calls() -> Calls:
    return recorded(models.qwen_kwargs)


def exported(model: PluggableModel, out: Path, keeps: tuple[float, ...] = (1.0,), **options: Any) -> Any:
    mine = {name: options.pop(name) for name in list(options) if name in ExportConfig.model_fields}
    return export(model, out, ExportConfig(keep=keeps, runs=1, **mine), **options)


def test_recorded_calls_of_several_shapes(qwen: PluggableModel, calls: Calls, tmp_path: Path) -> None:
    notes: list[str] = []
    saved = tmp_path / "calls"
    calls.save(saved)
    made = exported(qwen, tmp_path / "out", calls=Calls.open(saved), check_calls=4, note=notes.append).ratios[0]
    assert made.gate.calls.compared == 4 and 0 < made.gate.calls.relative < 1e-5
    assert made.gate.calls.worst.startswith("recorded call ") and "timestep" in made.gate.calls.worst
    assert made.gate.sampling is None
    assert notes == made.gate.not_checked == ["no sampling run was compared with PyTorch; give --pipeline"]


def test_heads_of_calls_need_no_tensor(calls: Calls, tmp_path: Path) -> None:
    calls.save(tmp_path / "calls")
    stored = Calls.open(tmp_path / "calls", check=False)
    for shard in (tmp_path / "calls").glob("*.safetensors"):
        shard.unlink()
    assert stored.heads() == calls.heads()
    assert [head.timestep for head in calls.heads()] == [call.timestep for call in calls]
    assert all(head.kwargs == {} for head in calls.heads())


def test_without_calls_it_says_that_none_were_compared(qwen: PluggableModel, calls: Calls, tmp_path: Path) -> None:
    notes: list[str] = []
    made = exported(qwen, tmp_path / "none", note=notes.append).ratios[0]
    assert made.gate.calls is None and notes == made.gate.not_checked
    assert [line for line in notes if "none were given, the inputs were random; give --calls" in line]
    card = json.loads(manifest_path(made.onnx).read_text())
    assert card["gate"]["not_checked"] == notes and card["gate"]["calls"] is None
    made = exported(qwen, tmp_path / "zero", calls=calls, check_calls=0).ratios[0]
    assert made.gate.calls is None and "none were asked for (--check-calls 0)" in made.gate.not_checked[0]


def test_calls_of_another_kind_are_counted_as_not_compared(
    qwen: PluggableModel, calls: Calls, tmp_path: Path
) -> None:
    other = Call(models.qwen_kwargs(mask=True), ("a", "b"), 0.9, 7, 2)
    made = exported(qwen, tmp_path / "out", calls=Calls([*calls, other])).ratios[0]
    assert made.gate.calls.compared == len(calls)
    assert made.gate.not_checked[0].startswith("1 of 6 recorded calls were not compared with PyTorch")
    assert "call 7" in made.gate.not_checked[0] and "encoder_hidden_states_mask" in made.gate.not_checked[0]


def test_a_run_that_never_calls_the_transformer(qwen: PluggableModel, tmp_path: Path) -> None:
    class Idle:
        """Draws without a transformer."""

        transformer: Any = None

        def __call__(self, prompt: list[str], output_type: str = "pt") -> tuple[torch.Tensor]:
            """Return nothing of anybody's."""
            return (torch.zeros(len(prompt), 3, 4, 4),)

    with pytest.raises(PpclError, match="Idle did not call its transformer; there is nothing to compare") as caught:
        exported(qwen, tmp_path / "out", sampling=SamplingRun(Idle(), ["a"]))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# ---- it fails --------------------------------------------------------------------------------------------------


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change one weight of a file after it was written and before it is compared; `only` the files of that name."""

    def arrange(by: float, only: str = "") -> None:
        save = one_graph.save

        def damaged(model: Any, path: Path, *, embed: bool) -> Any:
            data = save(model, path, embed=embed)
            if only in path.name:
                proto = onnx.load(str(path))
                weight = next(t for t in proto.graph.initializer if t.name.endswith("proj_out.weight"))
                values = numpy_helper.to_array(weight).copy()
                values[0] += by
                weight.CopyFrom(numpy_helper.from_array(values, weight.name))
                onnx.save(proto, str(path))
            return data

        monkeypatch.setattr(one_graph, "save", damaged)

    return arrange


def test_a_damaged_weight_fails_on_recorded_calls(
    qwen: PluggableModel, calls: Calls, tmp_path: Path, damage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(1e-3)
    # The shapes are compared by their largest difference, which would find it first.
    monkeypatch.setattr(one_graph, "_check", lambda *_: None)
    with pytest.raises(PpclError) as caught:
        exported(qwen, tmp_path / "out", calls=calls, embed=True)
    line = str(caught.value)
    assert "keep-1.onnx: it differs from PyTorch by a relative error of" in line and "recorded call" in line
    assert "more than 0.0001" in line and "allow more with --tolerance" in line and "\n" not in line
    assert not (tmp_path / "out").exists()
    made = exported(qwen, tmp_path / "out", calls=calls, embed=True, tolerance=0.1).ratios[0]
    assert 1e-4 < made.gate.calls.relative < 0.1


def test_a_damaged_weight_fails_on_the_shapes(
    qwen: PluggableModel, calls: Calls, tmp_path: Path, damage: Callable[..., None]
) -> None:
    damage(0.1)
    with pytest.raises(PpclError, match=r"differs from PyTorch by .* at the shape"):
        exported(qwen, tmp_path / "out", calls=calls, embed=True)


def test_earlier_ratios_stay_whole(
    qwen: PluggableModel, calls: Calls, tmp_path: Path, damage: Callable[..., None]
) -> None:
    damage(0.1, only="keep-0")
    keeps = (1.0, share(qwen))
    with pytest.raises(PpclError, match=f"keep-{keeps[1]:g}.onnx"):
        exported(qwen, tmp_path, keeps, calls=calls)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"head.json", "keep-1.json", "keep-1.onnx", "weights"}
    (card,) = check_artefacts(tmp_path)
    assert card.keep == 1.0 and list(artefacts(tmp_path)) == [1.0]


def test_what_was_there_before_stays_with_its_weights(
    qwen: PluggableModel, calls: Calls, tmp_path: Path, damage: Callable[..., None]
) -> None:
    exported(qwen, tmp_path, calls=calls)
    teacher, kwargs = models.tiny_qwen(seed=5, blocks=3)
    damage(0.1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()}
    for model in (qwen, student(teacher, kwargs, 0)):  # the same weights, and others
        with pytest.raises(PpclError, match="differs from PyTorch"):
            exported(model, tmp_path, calls=calls, overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("[!.]*") if path.is_file()} == before
    assert len(check_artefacts(tmp_path)) == 1


def test_sampling_fails_above_its_own_tolerance_and_by_its_score(qwen: PluggableModel, tmp_path: Path) -> None:
    run = families.run_of(families.qwen)
    with pytest.raises(PpclError, match="over a whole sampling run it differs from PyTorch") as caught:
        exported(qwen, tmp_path / "out", sampling=run, sampling_tolerance=0.0)
    line = str(caught.value)
    assert "the prompt '" in line and "allow more with --sampling-tolerance" in line and "\n" not in line
    exact = dataclasses.replace(run, score=lambda latents, _: float(latents.double().sum()))  # it sees the last bit
    with pytest.raises(PpclError, match="keep-1.onnx: pictures drawn with it score .* must score the same"):
        exported(qwen, tmp_path / "out", sampling=exact)
    assert not (tmp_path / "out").exists()


# ---- manifests -------------------------------------------------------------------------------------------------


def test_a_manifest_of_the_version_before_still_loads(qwen: PluggableModel, tmp_path: Path) -> None:
    made = exported(qwen, tmp_path).ratios[0]
    path = manifest_path(made.onnx)
    old = json.loads(path.read_text()) | {"version": 2}
    del old["gate"], old["seal"]
    write_json(path, old)
    assert artefacts(tmp_path)[1.0].manifest.gate is None
    write_json(path, old | {"version": 1})
    with pytest.raises(PpclError, match="version") as caught:
        artefacts(tmp_path)
    assert "\n" not in str(caught.value)
    assert Agreement.model_validate(json.loads(json.dumps(worst([agreement(*[torch.ones(2)] * 2, "x")]).model_dump())))
