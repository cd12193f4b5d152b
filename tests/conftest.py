"""Shared fixtures: the small random models, new for each test."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported. On some processors MKL's last bits depend on the address of a tensor otherwise, and weights
# that are mapped from a file lie at any address. With AVX2 they do so on Intel's processors that have more.
os.environ.setdefault(
    "MKL_CBWR",
    "AVX512"
    if os.path.exists("/proc/cpuinfo") and {"GenuineIntel", "avx512f"} <= set(Path("/proc/cpuinfo").read_text().split())
    else "AVX2",
)

import pytest
import torch
from torch import nn

from tests import models

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core; more threads would only wait for each other

# Graphs are many small objects, and most of what is imported stays: collecting as usual takes a fifth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)


class _OnDisk(dict[str, Any]):
    """Translations that all processes of a run share: PyTorch takes seconds for each."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._file(str(key)).exists()

    def __missing__(self, key: str) -> Any:
        import onnx_ir

        graph = onnx_ir.load(self._file(key)).graph
        super().__setitem__(key, graph)
        return graph

    def __setitem__(self, key: str, graph: Any) -> None:
        import onnx_ir

        super().__setitem__(key, graph)
        beside = self._folder / f"{uuid.uuid4().hex}.partial"
        onnx_ir.save(onnx_ir.Model(graph.clone(), ir_version=11), beside)
        beside.replace(self._file(key))


@pytest.fixture(scope="session")
def translated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let every export of a run share one store of translations, but where a test makes its own."""
    from ppcl_fx.export import exporting

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    known = exporting.Translations(_OnDisk(shared / "translated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "Translations", lambda: known)
        yield


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, translated_once: None) -> Path:
    """Every folder that the commands write, of a small random pipeline; to be copied, not changed."""
    from ppcl_fx.cli.app import main
    from tests.cli_place import Place
    from tests.shapes_folder import save_pipeline

    folder = tmp_path_factory.mktemp("written")
    place = Place(folder)
    save_pipeline(place.model)
    prompts = [f"{count} {colour} circles" for count in ("two", "three") for colour in ("red", "green", "blue")]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    edit = {"kind": "depth", "stack": "transformer_blocks", "first": 1, "last": 3}
    place.plan.write_text(json.dumps({"edits": [edit]}), encoding="utf-8")
    for command in (
        ["analyze", place.model, "-o", place.run, "--prompts", folder / "prompts.txt", "--steps", 2],
        ["rewrite", place.model, "--plan", place.plan, "--calls", place.calls, "-o", place.student],
        ["train", place.student, "--calls", place.calls, "--steps", "2,1,2", "--every", "1", "--effects", "1"],
        ["export", place.student, "--keep", "1.0", "-o", folder / "engines", "--runs", "1"],
        ["export", place.student, "--keep", "1.0,0.7", "--format", "diffusers", "-o", folder / "stock"],
    ):
        assert main([*map(str, command)]) == 0, command
    return folder


@pytest.fixture
def tiny_qwen() -> tuple[nn.Module, dict[str, Any]]:
    """A small Qwen-Image transformer and inputs for it."""
    return models.tiny_qwen()


@pytest.fixture
def tiny_flux() -> tuple[nn.Module, dict[str, Any]]:
    """A small FLUX transformer (both kinds of block) and inputs for it."""
    return models.tiny_flux()


@pytest.fixture
def tiny_sd3() -> tuple[nn.Module, dict[str, Any]]:
    """A small SD3.5 transformer (three stacks) and inputs for it."""
    return models.tiny_sd3()


@pytest.fixture(params=["qwen", "flux", "sd3"])
def tiny(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    """Each of the three in turn."""
    build = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}[request.param]
    return build()
