"""Sources: what may be MODEL, and what is refused before anything of it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, QwenImageTransformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ppcl_fx.calls.record import record
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.model.sources import open_source
from ppcl_fx.shapes.pipeline import CHANNELS, ShapesPipeline
from ppcl_fx.shapes.words import WordEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_qwen() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    ShapesPipeline(small_qwen(), FlowMatchEulerDiscreteScheduler(), WordEncoder(channels=12)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pipeline_folder(saved: Path) -> None:
    source = open_source(str(saved))
    assert (source.kind, source.folder, source.name) == ("pipeline", saved, str(saved))
    pipeline = source.pipeline()
    assert isinstance(pipeline, ShapesPipeline) and not pipeline.transformer.training
    assert fingerprint(pipeline.transformer) == fingerprint(source.transformer()) == fingerprint(small_qwen())
    assert len(record(pipeline, "a red circle", num_inference_steps=1)) == 2
    assert source.transformer(torch.bfloat16).dtype == torch.bfloat16
    assert source.pipeline(torch.bfloat16).text_encoder.dtype == torch.bfloat16


def test_a_bare_transformer(saved: Path) -> None:
    source = open_source(str(saved / "transformer"))
    assert source.kind == "transformer" and fingerprint(source.transformer()) == fingerprint(small_qwen())
    with pytest.raises(PpclError, match="without its pipeline"):
        source.pipeline()


def test_a_pipeline_with_empty_components(tmp_path: Path) -> None:
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = dict.fromkeys(names)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=small_qwen(), **parts
    ).save_pretrained(tmp_path / "flux")
    edit(tmp_path / "flux" / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])
    assert open_source(str(tmp_path / "flux")).kind == "pipeline"


def test_shapes() -> None:
    source = open_source("shapes")
    assert source.kind == "pipeline" and source.transformer().config.num_layers > 2
    assert len(record(source.pipeline(), "a red circle", num_inference_steps=1)) == 2


INDEX_REFUSALS = {
    "custom pipeline": ({"_class_name": ["pipeline", "Mine"]}, "the pipeline is code of its own.*never run"),
    "remote code": ({"trust_remote_code": True}, "asks for trust_remote_code.*never run"),
    "custom module": (
        {"text_encoder": ["mine", "Encoder"]},
        "'text_encoder' is of the module 'mine'.*never run",
    ),
    "os": ({"text_encoder": ["os", "system"]}, "'text_encoder' is of the module 'os'.*never run"),
    "misspelt": ({"_class_name": "FluxPipelin"}, "no class 'FluxPipelin'.*did you mean 'FluxPipeline'"),
    "no pipeline": ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel is not a pipeline"),
    "no class": ({"_class_name": None}, "has no _class_name"),
    "component": ({"scheduler": ["diffusers", "EulerDiscrete"]}, "no class 'EulerDiscrete'"),
    "not a class": ({"scheduler": ["diffusers", "utils"]}, "no class 'utils'"),
    "shape of entry": ({"scheduler": ["diffusers"]}, "not a library and a class"),
    "no transformer": ({"transformer": [None, None]}, "no transformer"),
}


@pytest.mark.parametrize("case", INDEX_REFUSALS)
def test_refused_indices(folder: Path, case: str) -> None:
    changes, reason = INDEX_REFUSALS[case]
    edit(folder / "model_index.json", **changes)
    with pytest.raises(PpclError, match=reason) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("place", ["pipeline.py", "transformer/mine.py"])
def test_python_files_are_refused_and_not_run(folder: Path, place: str) -> None:
    (folder / place).write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(PpclError, match="Python file in a model folder"):
        open_source(str(folder))
    if "/" in place:
        with pytest.raises(PpclError, match="Python file in a model folder"):
            open_source(str(folder / "transformer"))
    assert not (folder / "ran").exists()


def test_refused_transformers(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    for changes, reason in (
        ({"_class_name": "QwenImageTransformer"}, "did you mean 'QwenImageTransformer2DModel'"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is not a model"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "asks for auto_map"),
    ):
        before = config.read_text()
        edit(config, **changes)
        for path in (folder, folder / "transformer"):
            with pytest.raises(PpclError, match=reason):
                open_source(str(path))
        config.write_text(before)
    config.write_text("{")
    with pytest.raises(PpclError, match="not valid JSON"):
        open_source(str(folder))
    config.unlink()
    with pytest.raises(PpclError, match="no such file"):
        open_source(str(folder))


def test_damaged_weights(folder: Path) -> None:
    source, weights = open_source(str(folder)), folder / "transformer" / WEIGHTS
    whole = weights.read_bytes()
    tensors = load_file(weights)
    name = sorted(tensors)[0]

    def refused(reason: str) -> None:
        for load in (source.transformer, source.pipeline):
            with pytest.raises(PpclError, match=reason) as caught:
                load()
            assert "\n" not in str(caught.value)

    weights.write_bytes(whole[:-10])
    refused("truncated or not a safetensors file")
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    refused(f"the weights lack {name}, which QwenImageTransformer2DModel has")
    save_file({**tensors, "extra": torch.ones(1)}, weights)
    refused("the weights hold extra, which QwenImageTransformer2DModel does not have")
    save_file({**tensors, name: torch.ones(3)}, weights)
    refused(rf"{name} is \[3\] here and \[{tensors[name].shape[0]}.*\] in QwenImageTransformer2DModel")
    weights.unlink()
    refused("holds neither")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    weights = folder / "transformer" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(PpclError, match="holds neither .*safetensors"):
        open_source(str(folder)).transformer()


def test_other_things(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, reason in (
        ("modle", "no such model.*did you mean 'model'"),
        ("shapse", "did you mean 'shapes'"),
        ("model/transfromer", "did you mean 'model/transformer'"),
        ("/nowhere/at/all", "no such model"),
        ("model/model_index.json", "is a file"),
        ("model/scheduler", "neither model_index.json nor config.json"),
    ):
        with pytest.raises(PpclError, match=reason):
            open_source(name)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "plan.json").write_text("{}")
    with pytest.raises(PpclError, match=r"not a teacher; open it with ppcl_fx\.load"):
        open_source("student")


def test_a_hub_id(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: what is in the cache opens, and what is not gets one line."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    source = open_source("org/name")
    assert source.kind == "pipeline" and fingerprint(source.transformer()) == fingerprint(small_qwen())
    with pytest.raises(PpclError, match="org/none: cannot be downloaded from the hub") as caught:
        open_source("org/none")
    assert "\n" not in str(caught.value)
