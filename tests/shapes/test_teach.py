"""Teaching: growth keeps the function, the quick path is exact, checkpoints go on where they stopped."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.io.owned_folders import PIPELINE, foreign
from ppcl_fx.shapes.course import empty_transformer, grow, load_state, new_transformer, save_state, speed_up
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.shapes.teach import main, read_arguments, teach


def _inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 64, 27, generator=generator),
        "encoder_hidden_states": torch.randn(2, 10, 64, generator=generator),
        "timestep": torch.tensor([0.2, 0.9]),
        "img_shapes": [[(1, 8, 8)]] * 2,
        "return_dict": False,
    }


def _random(blocks: int) -> Any:
    torch.manual_seed(0)
    return empty_transformer(blocks)


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(**_inputs())[0]
    return answer


def test_a_new_transformer_answers_zero() -> None:
    assert float(_answer(new_transformer(1, 0)).abs().max()) == 0.0


def test_growing_nearly_keeps_the_function() -> None:
    small = _random(2)
    large, plain = empty_transformer(4), empty_transformer(4)
    large.load_state_dict(grow(small.state_dict()))
    twice = grow(small.state_dict())
    for name in twice:
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        if match:
            twice[name] = small.state_dict()[f"transformer_blocks.{int(match[1]) // 2}.{match[2]}"]
    plain.load_state_dict(twice)
    truth = _answer(small)
    near, far = ((_answer(model) - truth).norm() / truth.norm() for model in (large, plain))
    assert float(near) < 1e-3
    assert float(near) < 0.1 * float(far)


def test_the_quick_path_gives_the_same_answer() -> None:
    model = _random(2)
    truth = _answer(model)
    names = list(model.state_dict())
    speed_up(model, compiled=False)
    assert torch.allclose(_answer(model), truth, atol=2e-5)
    assert list(model.state_dict()) == names


def test_a_state_is_read_back_and_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(PpclError, match="no checkpoint"):
        load_state(path)
    save_state(path, {"a": torch.ones(2)}, {"step": 3, "seconds": 0.5})
    with pytest.raises(Exception, match="."):
        save_state(path, {"a": "not a tensor"}, {})  # type: ignore[dict-item]
    tensors, facts = load_state(path)
    assert torch.equal(tensors["a"], torch.ones(2)) and facts == {"step": 3, "seconds": 0.5}


def _arguments(out: Path, *more: str) -> argparse.Namespace:
    common = ["--blocks", "4", "--batch", "2", "--workers", "1", "--no-compile", "--score-prompts", "0"]
    return read_arguments(["--out", str(out), *common, *more])


def test_a_run_stops_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teach(_arguments(tmp_path, "--minutes", "0.01"))
    tensors, facts = load_state(tmp_path / "state.safetensors")
    assert facts["step"] >= 1 and facts["seconds"] >= 0.6
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]
    assert foreign(tmp_path / "latest", PIPELINE) is None
    pipeline = ShapesPipeline.from_pretrained(tmp_path / "latest")
    assert len(pipeline.transformer.transformer_blocks) == 4

    more = str(facts["seconds"] / 60 + 0.01)
    teach(_arguments(tmp_path, "--minutes", more, "--resume"))
    later, then = load_state(tmp_path / "state.safetensors")
    assert then["step"] > facts["step"]
    assert set(later) >= {name for name in tensors if name.startswith("model/")}


def test_a_folder_with_a_checkpoint_or_pictures_is_not_taught_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> str:
        monkeypatch.setattr(sys, "argv", ["teach", "--out", str(tmp_path), "--workers", "1", "--minutes", "0.001"])
        with pytest.raises(SystemExit) as error:
            main()
        return str(error.value)

    (tmp_path / "state.safetensors").write_bytes(b"kept")
    assert "state.safetensors: a checkpoint is there; go on with --resume" in refused()
    (tmp_path / "state.safetensors").unlink()
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "holiday.jpg").write_bytes(b"kept")
    assert "no model_index.json there says that ppcl-fx wrote" in refused()
    assert (tmp_path / "latest" / "holiday.jpg").read_bytes() == b"kept"
