"""Which file of a folder runs, in which runtime, on which device; and what is closed before the next one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.folder import artefacts
from ppcl_fx.export.runtime.sessions import SessionChoice, Sessions, choose, device_of
from ppcl_fx.export.store.manifest import Manifest, Port, WeightFile
from ppcl_fx.export.store.names import engine_path, manifest_path
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.request import Origin, find_graphs
from ppcl_fx.io.files import read_json, sha256_of, write_json
from ppcl_fx.schema.plan import DepthEdit, Plan
from tests.export.fake_trt import working
from tests.export.test_tensorrt import PROFILE, write_graph

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PLAN = Plan(edits=[DepthEdit(stack="blocks", first=1, last=2)])


def write_ratio(folder: Path, name: str = "keep-0.7", **fields: Any) -> Path:
    """A graph with its manifest, as an export writes them."""
    graph = write_graph(folder / f"{name}.onnx")
    weights = folder / "weights" / f"{name}.bin"
    port = Port(name="sample", dtype="float", shape=["batch", 4])
    told: dict[str, Any] = {
        "file": graph.name, "sha256": sha256_of(graph), "size": graph.stat().st_size, "dtype": "float32", "keep": 0.7,
        "weights": [WeightFile(file=f"weights/{name}.bin", sha256=sha256_of(weights), size=64)], "params": 16,
        "params_in_file": 16, "students": ["depth:blocks.1-2"], "plan": PLAN, "opset": 23, "inputs": [],
        "outputs": [port], "positions": [], "parity": {}, "parity_max_abs": None, "unchecked": None, "tolerance": 1e-4,
        "latency_ms": None, "made": {},
    }  # fmt: skip
    write_json(manifest_path(graph), Manifest(**told | fields))
    return graph


def build(folder: Path) -> Path:
    """An engine for the one ratio of a folder."""
    ((name, onnx),) = find_graphs(folder).items()
    origin = read_json(folder / f"{name}.json", Origin)
    build_engine(onnx, engine_path(onnx), [PROFILE], api=working(), origin=origin)
    return engine_path(onnx)


# ---- engines ---------------------------------------------------------------------------------------------------


def test_an_engine_belongs_to_the_graph_that_is_there(tmp_path: Path) -> None:
    write_ratio(tmp_path)
    engine = build(tmp_path)
    assert artefacts(tmp_path)[0.7].engine == engine
    # A second graph, in bfloat16: the engine of the first is old, whichever name comes later.
    typed = write_ratio(tmp_path, "keep-0.7.bf16", dtype="bfloat16")
    assert artefacts(tmp_path)[0.7].engine is None
    newer = build(tmp_path)
    assert newer.name == "keep-0.7.bf16.engine" and artefacts(tmp_path)[0.7].engine == newer
    # An export without engines withdraws that graph, and its engine stays behind.
    typed.unlink()
    manifest_path(typed).unlink()
    assert artefacts(tmp_path)[0.7].engine == engine


@pytest.mark.parametrize(
    "fields", [{"sha256": "0" * 64}, {"students": []}, {"plan": None}], ids=["graph", "students", "plan"]
)
def test_an_engine_of_an_older_export_is_as_none(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_ratio(tmp_path)
    build(tmp_path)
    write_ratio(tmp_path, **fields)
    found = artefacts(tmp_path)[0.7]
    assert (found.engine, found.engine_manifest) == (None, None)
    with pytest.raises(PpclError, match="no engine for the ratio 0.7; run: ppcl-fx build"):
        choose(found, "tensorrt", CUDA)


def test_commands_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "my engines"
    write_ratio(folder)
    found = artefacts(folder)[0.7]
    assert SessionChoice("tensorrt", found, CUDA).again == f"ppcl-fx build '{folder}' --overwrite"
    assert SessionChoice("torch", found, CPU).again == f"ppcl-fx export STUDENT --keep 0.7 -o '{folder}' --overwrite"


# ---- runtimes and devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "onnxruntime"), ("bfloat16", "torch"), ("float16", "torch")]
)
def test_half_precision_on_a_cpu_runs_in_pytorch(tmp_path: Path, dtype: str, expected: str) -> None:
    write_ratio(tmp_path, dtype=dtype)
    found = artefacts(tmp_path)[0.7]
    assert choose(found, "auto", CPU).backend == expected
    assert choose(found, "onnxruntime", CPU).backend == "onnxruntime"  # who names it gets it


def test_other_devices_run_in_pytorch_or_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ratio(tmp_path)
    found, mps = artefacts(tmp_path)[0.7], torch.device("mps")
    assert choose(found, "auto", mps).backend == "torch"
    with pytest.raises(PpclError, match="onnxruntime does not run on mps here; use backend='torch'"):
        choose(found, "onnxruntime", mps)
    with pytest.raises(PpclError, match="no device 'nonsense'; give cpu, cuda or cuda:1"):
        device_of("nonsense")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [str(device_of(name)) for name in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda:1", "cuda:0"]
    with pytest.raises(PpclError, match="cuda:2: PyTorch sees 2 GPUs here"):
        device_of("cuda:2")


def test_on_a_gpu_only_pytorch_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", ended.append)

    class Opening(Sessions):
        def _open(self, choice: SessionChoice, adapter: Any) -> Any:
            return SimpleNamespace(choice=choice)

    def chosen(keep: float, backend: str, device: torch.device = CUDA) -> Any:
        artefact = SimpleNamespace(manifest=SimpleNamespace(keep=keep))
        return SimpleNamespace(artefact=artefact, backend=backend, device=device)

    def after(*choices: Any) -> list[float]:
        running = Opening()
        running.shared["a weight"] = torch.zeros(1)
        for choice in choices:
            running.get(choice, None)  # type: ignore[arg-type]
        assert bool(running.shared) == all(one.backend == "torch" or one.device == CPU for one in choices)
        return list(running.opened)

    assert after(chosen(1.0, "tensorrt"), chosen(0.7, "tensorrt")) == [0.7]
    assert after(chosen(1.0, "tensorrt"), chosen(0.7, "torch"), chosen(0.5, "torch")) == [0.7, 0.5]
    assert after(chosen(1.0, "torch"), chosen(0.7, "torch"), chosen(0.5, "onnxruntime")) == [0.5]
    assert ended == [CUDA] * 4
    assert after(chosen(1.0, "onnxruntime", CPU), chosen(0.7, "torch", CPU)) == [1.0, 0.7]
