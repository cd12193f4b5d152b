"""From pluggable models to ONNX files that onnxruntime runs like PyTorch, on other shapes too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, Manifest, export, one_graph
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.export.verify.metrics import difference
from ppcl_fx.export.verify.onnx_runner import session
from ppcl_fx.io.files import read_json
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from tests import models

BLOCKS = "transformer_blocks"
ONE = ExportConfig(keep=(1.0,))


def call(kwargs: dict[str, Any], batch: int = 2) -> Call:
    return Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=batch)


@pytest.fixture(scope="module")
def qwen() -> PluggableModel:
    """Three blocks; one edit makes a student of the first two."""
    teacher, kwargs = models.tiny_qwen(blocks=3)
    return ppcl_fx.rewrite(trace(teacher, kwargs), Plan(edits=[DepthEdit(stack=BLOCKS, first=0, last=1)]))


@pytest.fixture(scope="module")
def exported(qwen: PluggableModel, tmp_path_factory: pytest.TempPathFactory, translated_once: None) -> Any:
    """The model at two ratios, with the steps that were reported."""
    seen: list[tuple[int, int]] = []
    result = export(
        qwen,
        tmp_path_factory.mktemp("engines"),
        ExportConfig(keep=(1.0, 0.75), runs=3),
        calls=Calls([call(models.qwen_kwargs())]),
        progress=lambda done, total, label="": seen.append((done, total)),
    )
    return result, seen


def test_each_ratio_has_a_checked_file(exported: Any, qwen: PluggableModel) -> None:
    result, _ = exported
    assert [ratio.onnx.name for ratio in result.ratios] == ["keep-1.onnx", "keep-0.75.onnx"]
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "head.json", "keep-0.75.json", "keep-0.75.onnx", "keep-1.json", "keep-1.onnx", "weights",
    ]  # fmt: skip
    assert [p.name for p in (result.folder / "weights").iterdir()] == ["float32.safetensors"]
    assert [ratio.students for ratio in result.ratios] == [(), tuple(qwen.edits)]
    for ratio in result.ratios:
        onnx.checker.check_model(str(ratio.onnx), full_check=True)
        assert set(ratio.parity) == {"traced", "batch=3", "hidden_states_1=36", "encoder_hidden_states_1=21", "all"}
        assert ratio.parity_max_abs is not None and 0 < ratio.parity_max_abs == max(ratio.parity.values()) < 1e-5
        assert ratio.latency_ms is not None and ratio.latency_ms > 0 and ratio.unchecked is None
    assert qwen.students == ()


def test_inputs_are_open_where_sizes_change(exported: Any) -> None:
    running = session(exported[0].ratios[1].onnx)
    assert {i.name: i.shape for i in running.get_inputs()} == {
        "hidden_states": ["batch", "hidden_states_1", 16],
        "encoder_hidden_states": ["batch", "encoder_hidden_states_1", 24],
        "timestep": ["batch"],
        "image_rotary": ["hidden_states_1", 8, 2],
        "text_rotary": ["encoder_hidden_states_1", 8, 2],
    }
    assert {o.name: o.shape for o in running.get_outputs()} == {"sample": ["batch", "hidden_states_1", 16]}


def test_file_agrees_with_the_model_on_a_call_it_never_saw(exported: Any, qwen: PluggableModel) -> None:
    unseen = models.qwen_kwargs(batch=1, height=3, width=7, text=11, seed=9)
    rope = models.tiny_qwen()[0].pos_embed
    image, text = rope(unseen["img_shapes"], max_txt_seq_len=11, device=torch.device("cpu"))
    feeds = {name: unseen[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
    feeds |= {"image_rotary": torch.view_as_real(image), "text_rotary": torch.view_as_real(text)}
    for ratio in exported[0].ratios:
        with torch.no_grad():
            expected = qwen.plug(students=ratio.students)(**unseen)[0]
        result = session(ratio.onnx).run(None, {name: tensor.numpy() for name, tensor in feeds.items()})[0]
        assert difference(torch.from_numpy(result), expected) < 1e-5
    qwen.plug(students=[])


def test_sidecar_says_how_the_file_was_made(exported: Any, qwen: PluggableModel) -> None:
    for ratio in exported[0].ratios:
        card = read_json(manifest_path(ratio.onnx), Manifest)
        assert card.opset == 23
        assert card.params == ratio.params == qwen.param_count(ratio.students)
        # The text half of the last block has no effect on the picture, so it is not in the file.
        assert 0 < card.params_in_file < card.params
        model = onnx.load(str(ratio.onnx), load_external_data=False)
        sizes = {i.name: int(torch.tensor(i.dims).prod()) for i in model.graph.initializer}
        names = {name for name, _ in qwen.graph.named_parameters(remove_duplicate=False)}
        assert sum(size for name, size in sizes.items() if name in names) == card.params_in_file
        assert card.positions == ["image_rotary", "text_rotary"]
        assert card.plan is not None and card.plan.ids == qwen.edits
        assert {"positions-as-inputs", "complex-to-real", "drop-guards", "expand"} <= set(card.made["passes"])
        assert card.parity == ratio.parity
        assert not any(str(Path.cwd()) in str(prop) for node in model.graph.node for prop in node.metadata_props)


def test_smaller_ratio_has_fewer_weights(exported: Any) -> None:
    cards = [read_json(manifest_path(ratio.onnx), Manifest) for ratio in exported[0].ratios]
    assert cards[1].params_in_file < 0.8 * cards[0].params_in_file
    assert cards[0].weights == cards[1].weights


def test_progress_counts_to_the_end(exported: Any) -> None:
    result, seen = exported
    assert seen[0] == (0, 8) and seen[-1] == (8, 8)
    assert [done for done, _ in seen] == list(range(9))
    assert json.loads(json.dumps(result.to_json()))["ratios"][1]["keep"] == 0.75


def test_too_large_a_difference_leaves_nothing(
    qwen: PluggableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_graph, "compare", lambda *_: ({"traced": 1e-6, "all": 3e-3}, None))
    with pytest.raises(PpclError, match="differs from PyTorch by 0.003 at the shape 'all', more than 0.0001"):
        export(qwen, tmp_path, ONE)
    assert list(tmp_path.iterdir()) == []
    assert qwen.students == ()


def test_difference_is_never_small_for_nonsense() -> None:
    ones = torch.ones(2, 3)
    assert difference(ones, ones + 1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert difference(ones, torch.ones(2, 4)) == float("inf")
    assert difference(ones * float("nan"), ones) == float("inf")


def test_existing_file_is_kept(qwen: PluggableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keep-1.onnx").write_text("mine")
    with pytest.raises(PpclError, match="already exists"):
        export(qwen, tmp_path, ONE)
    assert (tmp_path / "keep-1.onnx").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["keep-1.onnx"]


def test_unreachable_ratio_stops_before_anything_is_written(qwen: PluggableModel, tmp_path: Path) -> None:
    with pytest.raises(PpclError):
        export(qwen, tmp_path / "out", ExportConfig(keep=(1.0, 0.01)))
    assert not (tmp_path / "out").exists()


def test_unknown_format_has_a_near_match() -> None:
    with pytest.raises(PpclError, match=r"option format: not one of onnx, .* \(did you mean 'onnx'\?\)"):
        ExportConfig(format="onxx")  # type: ignore[arg-type]


def test_no_calls_to_take_an_example_from(qwen: PluggableModel, tmp_path: Path) -> None:
    with pytest.raises(PpclError, match="no calls to take an example from"):
        export(qwen, tmp_path / "out", ONE, calls=Calls([]))


def test_tensorrt_without_tensorrt_leaves_the_onnx(
    qwen: PluggableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, translated_once: None
) -> None:
    from ppcl_fx.export.tensorrt import folder

    def missing(left: str, kind: str) -> Any:
        raise PpclError(f'tensorrt is not installed: pip install "ppcl-fx[tensorrt]"; {left}')

    monkeypatch.setattr(folder, "load_builder", missing)
    with pytest.raises(PpclError, match=f"the ONNX files stay in {tmp_path}"):
        export(qwen, tmp_path, ExportConfig(keep=(1.0,), format="tensorrt"))
    assert {"keep-1.onnx", "keep-1.bf16.onnx", "build.json"} <= {path.name for path in tmp_path.iterdir()}
