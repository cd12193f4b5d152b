"""A fine-tuned student, exported from its folder, runs in a transformer's place and computes what PyTorch computes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import ppcl_fx
from ppcl_fx import EngineTransformer
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, check_artefacts, export
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.student_folder import FinetunedFolder, save_finetuned
from ppcl_fx.tracing import bind
from ppcl_fx.train import load_finetuned
from tests.cli_place import Place
from tests.export.killed import save_student
from tests.models import qwen_kwargs

pytestmark = pytest.mark.slow

OTHER = {"batch": 1, "height": 3, "width": 7, "text": 11, "seed": 9}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with two fine-tuned models beside it, as `train` saves them."""
    folder = save_student(tmp_path_factory.mktemp("tuned") / "student")
    model = ppcl_fx.load(folder)
    assert isinstance(model, ppcl_fx.PluggableModel)
    for name, students in (("finetuned", model.edits), ("finetuned-0.9", model.edits[1:])):
        gm = copy.deepcopy(mixture(model, students))
        with torch.no_grad():
            for parameter in gm.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        save_finetuned(gm, model, students, folder / name)
    return folder


@pytest.fixture
def place(student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Place:
    """A copy, and the program."""
    shutil.copytree(student, tmp_path / "student")
    return Place(tmp_path, capfd)


def expected(folder: Path, kwargs: dict[str, Any]) -> torch.Tensor:
    """What the fine-tuned model in a folder computes in PyTorch."""
    model = ppcl_fx.load(folder.parent)
    assert isinstance(model, ppcl_fx.PluggableModel)
    gm = load_finetuned(model, folder)
    with torch.no_grad():
        found = gm(**bind(gm, kwargs))[0]
    assert isinstance(found, torch.Tensor)
    return found


def answer(out: Path, kwargs: dict[str, Any], backend: str) -> torch.Tensor:
    with torch.no_grad():
        found = EngineTransformer(out, backend=backend, device="cpu")(**kwargs)[0]
    assert isinstance(found, torch.Tensor)
    return found


def test_a_finetuned_student_stands_in_a_pipeline(student: Path, tmp_path: Path) -> None:
    kwargs, folder = qwen_kwargs(), student / "finetuned"
    wanted = expected(folder, kwargs)

    def computed(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found = model(**kwargs)[0]
        assert isinstance(found, torch.Tensor)
        return found

    model: Any = ppcl_fx.load(folder)
    assert (model.inner_dim, model.edits) == (32, [])
    assert model.param_count() == sum(parameter.numel() for parameter in model.parameters())
    assert torch.equal(computed(torch.compile(model, backend="eager")), wanted)
    assert ppcl_fx.load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    try:
        model.set_attention_backend("_native_math")
        assert torch.allclose(computed(model), wanted, atol=1e-5)
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()
    _, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(computed(model), wanted)
    hook.remove()
    for words, refused in {
        "lacks blocks of its teacher, .* load it in the dtype": lambda: model.to(torch.bfloat16),
        "a fine-tuned model has no place for a LoRA": lambda: model.load_lora_adapter({}),
        "has no teacher to save": lambda: model.save(tmp_path / "out"),
        "compile it whole": lambda: model.compile_repeated_blocks(),
    }.items():
        with pytest.raises(PpclError, match=words):
            refused()
    model.enable_group_offload("cpu", num_blocks_per_group=1)
    assert torch.equal(computed(model), wanted)
    shutil.copytree(folder, tmp_path / "alone")
    with pytest.raises(PpclError, match="ppcl.json"):
        ppcl_fx.load(tmp_path / "alone")


def test_a_finetuned_student_runs_where_it_was_exported_to(place: Place) -> None:
    """In its own folder no weight is copied, and it is compared to PyTorch."""
    tuned = place.student / "finetuned"
    (ratio,) = place.ok("export", tuned, "-o", tuned, "--runs", 1)["ratios"]
    assert ratio["parity_max_abs"] is not None and ratio["parity_max_abs"] < 1e-5
    name = Path(ratio["onnx"]).stem
    assert sorted(path.name for path in tuned.iterdir()) == [
        "finetuned.json", "head.json", f"{name}.json", f"{name}.onnx", "model.safetensors"
    ]  # fmt: skip
    (card,) = check_artefacts(tuned)
    assert card.finetuned and [weight.file for weight in card.weights] == ["model.safetensors"]
    assert card.keep == ratio["keep"] == round(ratio["params"] / card.plan.teacher_params, 3)  # type: ignore[union-attr]
    for kwargs in (qwen_kwargs(), qwen_kwargs(**OTHER)):
        wanted = expected(tuned, kwargs)
        assert torch.equal(answer(tuned, kwargs, "torch"), wanted)
        assert torch.allclose(answer(tuned, kwargs, "onnxruntime"), wanted, rtol=0, atol=1e-5)
    assert "already exists" in place.refused("export", tuned, "-o", tuned)


def test_finetuned_students_and_ratios_share_a_folder(place: Place) -> None:
    """Without reading a weight, over copies of their own; the larger one has rows of a modulation."""
    out = place.folder / "out"
    for name in ("finetuned", "finetuned-0.9"):
        tuned = FinetunedFolder.open(place.student / name)
        assert all(parameter.is_meta for parameter in tuned.graph.parameters())
        export(tuned, out, ExportConfig(memory_limit=1))
    place.ok("export", place.student, "-o", out, "--keep", "1.0", "--memory-limit", "1k")
    assert [card.finetuned for card in check_artefacts(out)] == [True, True, False]
    copies = sorted(path.relative_to(out).as_posix() for path in (out / "weights").rglob("*.safetensors"))
    assert copies[:2] == ["weights/finetuned-0.9/model.safetensors", "weights/finetuned/model.safetensors"]
    engine = EngineTransformer(out, backend="torch", device="cpu")
    for keep, name in zip(engine.keeps[1:], ("finetuned-0.9", "finetuned"), strict=True):
        with torch.no_grad():
            found = engine.plug(keep=keep)(**qwen_kwargs(**OTHER))[0]
        assert torch.equal(found, expected(place.student / name, qwen_kwargs(**OTHER)))


def test_what_cannot_be_exported_is_one_line(place: Place) -> None:
    tuned, out = place.student / "finetuned", place.folder / "out"
    line = place.refused("export", place.student / "finetuned-0.8", "-o", out)
    assert "holds no fine-tuned model (did you mean 'finetuned-0.9'?); make it with: ppcl-fx train " in line
    assert line.endswith("--calls CALLS --stage finetune --steps 100 --keep 0.8")
    assert "which has one size; leave it out" in place.refused("export", tuned, "-o", out, "--keep", "0.5")
    for format, words in (("tensorrt", "--dtype bf16, and then run 'ppcl-fx build'"), ("diffusers", "leave it out")):
        assert words in place.refused("export", tuned, "-o", out, "--format", format)
    shutil.copytree(tuned, place.folder / "alone")
    line = place.refused("export", place.folder / "alone", "-o", out)
    assert "is not the pluggable model that it was made from; put it back into that folder" in line
    shutil.copy(place.student / "finetuned-0.9" / "model.safetensors", tuned)
    assert "does not fit the model's parameters" in place.refused("export", tuned, "-o", out)
    plan = place.student / "plan.json"
    whole = plan.read_text()
    plan.write_text(json.dumps(json.loads(whole) | {"model": "another"}))
    assert "not the model that plan.json was made for" in place.refused("export", tuned, "-o", out)
    plan.write_text(whole)
    card = json.loads((tuned / "finetuned.json").read_text())
    (tuned / "finetuned.json").write_text(json.dumps(card | {"plan": "another"}))
    assert "fine-tuned from another plan or model" in place.refused("export", tuned, "-o", out)
    assert not out.exists()
