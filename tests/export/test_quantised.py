"""Weights in few bits in an exported file: what it holds, that onnxruntime and PyTorch agree on it, and refusals."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import ppcl_fx
from ppcl_fx import EngineTransformer
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, check_artefacts, export, export_graph
from ppcl_fx.export.runtime.quantised_layers import put_quantised
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.export.verify.integrity import external_data
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder, save_finetuned
from ppcl_fx.passes.quantisation.layers import linear_layers
from ppcl_fx.tracing import trace
from tests import models
from tests.export.test_zero_copy import MODELS, keeps, saved

pytestmark = pytest.mark.slow

KINDS = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
BLOCKS = {"int8": None, "int4": 4, "fp8": None}


def calls_of(kwargs: dict[str, Any]) -> Calls:
    return Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=2)])


@pytest.fixture(scope="module", params=MODELS)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model with a depth and a feed-forward student."""
    return request.param, saved(request.param, tmp_path_factory.mktemp(request.param) / "student")


def quantised(folder: Path, out: Path, calls: Calls, **options: Any) -> Any:
    config = ExportConfig(**{"keep": keeps(folder), "runs": 1} | options)
    return export(StudentFolder.open(folder), out, config, calls=calls)


@pytest.mark.parametrize("weights", KINDS)
def test_every_ratio_runs_in_onnxruntime_and_in_pytorch(
    student: tuple[str, Path], tmp_path: Path, weights: str
) -> None:
    kind, folder = student
    kwargs = MODELS[kind][0]()[1]
    made = quantised(folder, tmp_path, calls_of(kwargs), weights=weights, block=BLOCKS[weights])
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"{weights}.safetensors"]
    cards = check_artefacts(tmp_path)
    for card, ratio in zip(sorted(cards, key=lambda card: -card.keep), made.ratios, strict=True):
        few = card.quantised
        assert few is not None and few.weights == weights and few.block == BLOCKS[weights] and few.kept == {}
        assert 0 < few.added_error < (0.2 if weights == "int4" else 0.06) and few.calls == 1
        assert card.params_in_file <= card.params and card.dtype == "float32"
        model = ir.load(ratio.onnx)
        stored = [v for v in model.graph.initializers.values() if v.dtype == KINDS[weights]]
        told = Counter(node.op_type for node in model.graph)
        assert told["DequantizeLinear"] == len(stored) + told["QuantizeLinear"]
        assert (told["QuantizeLinear"] > 0) == (weights == "fp8")
        assert len({v.name.partition("/rows")[0] for v in stored}) == few.layers
        assert {name for name, _, _ in external_data(ratio.onnx)} == {f"weights/{weights}.safetensors"}
        assert few.bytes == sum(v.const_value.nbytes for v in model.graph.initializers.values())
        onnx.checker.check_model(str(ratio.onnx), full_check=True)
    # The second one has rows of the feed-forward edit's modulation, and all of them the same bytes.
    runtimes = [EngineTransformer(tmp_path, backend=name, device="cpu") for name in ("onnxruntime", "torch")]
    for keep in runtimes[0].keeps:
        with torch.no_grad():
            first, second = (one.plug(keep=keep)(**kwargs)[0] for one in runtimes)
        assert float((first - second).norm() / second.norm()) < (2e-3 if weights == "fp8" else 1e-5)


def test_weights_on_disk_are_rounded_alike_block_by_block(student: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = student
    calls = calls_of(MODELS[kind][0]()[1])
    here = quantised(folder, tmp_path / "here", calls, weights="int4", block=4)
    there = quantised(folder, tmp_path / "there", calls, weights="int4", block=4, memory_limit=1)
    for one, other in zip(here.ratios, there.ratios, strict=True):
        assert one.onnx.read_bytes() == other.onnx.read_bytes() and other.unchecked is not None
        cards = [json.loads(manifest_path(ratio.onnx).read_text()) for ratio in (one, other)]
        assert cards[0]["quantised"] == cards[1]["quantised"]
    files = [load_file(tmp_path / name / "weights" / "int4.safetensors") for name in ("here", "there")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert not list((tmp_path / "there").glob(".*"))


@pytest.mark.parametrize("weights", KINDS)
def test_half_precision_has_its_scales_in_its_type(tmp_path: Path, weights: str) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)
    gm = trace(teacher, kwargs)
    for dtype, kind in (("bf16", ir.DataType.BFLOAT16), ("fp16", ir.DataType.FLOAT16)):
        config = ExportConfig(dtype=dtype, weights=weights, block=BLOCKS[weights], runs=1)
        done = export_graph(gm, tmp_path / f"{dtype}.onnx", config, calls=calls_of(kwargs))
        model = ir.load(done.onnx)
        scales = {v.dtype for name, v in model.graph.initializers.items() if name.endswith(("/scales", "/inputs"))}
        assert scales == {kind}
        assert done.gate is not None and done.gate.calls is not None
        assert done.gate.calls.relative < 1e-4


def test_layers_stay_until_the_output_is_within_the_error(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=2)
    gm = trace(teacher, kwargs)
    added = []
    for number, limit in enumerate((None, 0.02, 1e-9)):
        config = ExportConfig(weights="int4", block=4, weight_error=limit, runs=1)
        path = tmp_path / f"keep-0.{number}.onnx"
        if limit == 1e-9:
            with pytest.raises(PpclError, match="--weight-error 1e-09: no layer in int4 stays within it"):
                export_graph(gm, path, config, calls=calls_of(kwargs))
            assert not path.exists()
            continue
        export_graph(gm, path, config, calls=calls_of(kwargs))
        card = check_artefacts(path)[0].quantised
        # The file lacks the last block's three layers of the text stream: nothing reads what they give.
        assert card is not None and card.layers + len(card.kept) == len(linear_layers(gm)) - 3
        added.append((card.added_error, len(card.kept)))
    assert added[0][0] > 0.02 >= added[1][0] and added[0][1] == 0 < added[1][1]


def test_a_finetuned_model_has_its_own(tmp_path: Path) -> None:
    folder = saved("qwen", tmp_path / "student")
    model = ppcl_fx.load(folder)
    assert isinstance(model, ppcl_fx.PluggableModel)
    save_finetuned(mixture(model, model.edits), model, model.edits, folder / "finetuned")
    kwargs = models.tiny_qwen(blocks=4)[1]
    config = ExportConfig(weights="int8", runs=1)
    done = export(FinetunedFolder.open(folder / "finetuned"), tmp_path / "out", config, calls=calls_of(kwargs))
    assert check_artefacts(done.ratios[0].onnx)[0].quantised is not None
    with torch.no_grad():
        runtimes = [EngineTransformer(tmp_path / "out", backend=n, device="cpu") for n in ("torch", "onnxruntime")]
        first, second = (one(**kwargs)[0] for one in runtimes)
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4", "block": 7}, "--block 7: does not divide the 16 columns of .* that does, such as 4"),
        ({"weights": "int5"}, "weights: not one of stored, int8, int4, fp8 .did you mean 'int8'"),
        ({"block": 32}, "--block: only with --weights; leave it out, or give int4"),
        ({"weight_error": 0.1}, "--weight-error: only with --weights"),
        ({"weights": "int8", "format": "released"}, "--weights: not for --format released"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)
    with pytest.raises(PpclError, match=words) as caught:
        export_graph(trace(teacher, kwargs), tmp_path / "one.onnx", ExportConfig(**options), calls=calls_of(kwargs))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_calls_nothing_is_rounded(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)
    with pytest.raises(PpclError, match="--weights int8: rounding needs the inputs .* give --calls"):
        export_graph(trace(teacher, kwargs), tmp_path / "one.onnx", ExportConfig(weights="int8"))
    assert not list(tmp_path.iterdir())


def test_scales_that_are_gone_are_one_line(tmp_path: Path) -> None:
    folder = saved("qwen", tmp_path / "student")
    kwargs = models.tiny_qwen(blocks=4)[1]
    quantised(folder, tmp_path / "out", calls_of(kwargs), weights="int8", keep=[1.0])
    store = tmp_path / "out" / "weights" / "int8.safetensors"
    left = {name: tensor for name, tensor in load_file(store).items() if not name.endswith("/scales")}
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    save_file(left, tmp_path / "damaged" / "weights" / "int8.safetensors")
    with pytest.raises(PpclError, match=r"int8.safetensors: has \d+ bytes, and \d+ were written"):
        EngineTransformer(tmp_path / "damaged", backend="torch", device="cpu")(**kwargs)
    graph, gm = tmp_path / "out" / "keep-1.onnx", trace(*models.tiny_qwen(blocks=4))
    name = next(name for name in left if name.endswith("/values")).removesuffix("/values")
    with pytest.raises(PpclError, match=f"{name} is in few bits, and its scales are not there; export again"):
        put_quantised(gm, graph, {name: left[f"{name}/values"]}, lambda tensor: tensor)
    wrong = {name: left[f"{name}/values"], f"{name}/scales": torch.ones(3)}
    with pytest.raises(PpclError, match="these are not of the same weights; export them again"):
        put_quantised(gm, graph, wrong, lambda tensor: tensor)
