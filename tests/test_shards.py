"""Checkpoints that are read piece by piece: what is refused by the headers alone, and what is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.io.shards import INDEX, ONE_FILE, Shards
from ppcl_fx.model.sources import open_source
from tests import models

Builder = Callable[[], tuple[nn.Module, dict[str, Any]]]
BUILDERS: list[Builder] = [models.tiny_qwen, models.tiny_flux, models.tiny_sd3]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen-Image in several shards."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    models.tiny_qwen()[0].save_pretrained(folder, max_shard_size="200KB")  # type: ignore[operator]
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(sharded, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    with pytest.raises(PpclError) as error:
        open_source(str(folder)).checkpoint()
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("size", ["150KB", "5GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_the_loaded_model(
    build: Builder, size: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build()[0].save_pretrained(tmp_path, max_shard_size=size)  # type: ignore[operator]
    loaded = open_source(str(tmp_path)).transformer(dtype)
    checkpoint = open_source(str(tmp_path)).checkpoint(dtype)
    assert checkpoint.fingerprint == fingerprint(loaded)
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), tensor) and checkpoint.tensor(name).dtype == tensor.dtype
    real, mine = dict(loaded.named_buffers()), dict(checkpoint.model.named_buffers())
    assert real.keys() == mine.keys()
    assert all(torch.equal(mine[name], buffer) for name, buffer in real.items())
    assert checkpoint.shards.dtype(()) == torch.float32


def test_a_tensor_is_mapped_and_not_copied(sharded: Path) -> None:
    shards = Shards.open(sharded)
    name = "transformer_blocks.0.img_mlp.net.2.weight"
    tensor, again = shards.tensor(name), shards.tensor(name)
    assert tensor.data_ptr() == again.data_ptr()
    shards.close()
    assert tensor.isfinite().all()


def test_a_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    assert f"{shard}: no such file" in refused(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -8])
def test_a_truncated_shard(folder: Path, keep: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard}: truncated or not a safetensors file" in refused(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", ""]
)
def test_an_index_that_points_outside(folder: Path, name: str) -> None:
    change(folder / INDEX, lambda index: index["weight_map"].update({"proj_out.bias": name}))
    assert "which is not beside it" in refused(folder)


def test_a_shard_that_is_a_link_out(folder: Path, tmp_path: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "a symbolic link out of" in refused(folder)


def test_the_hub_cache_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0f" / "transformer"
    shutil.copytree(folder, snapshot)
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir()
    for position, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
        shard.rename(blobs / str(position))
        shard.symlink_to(blobs / str(position))
    assert open_source(str(snapshot)).checkpoint().dtype == torch.float32


def test_an_index_that_is_not_the_files(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    change(folder / INDEX, lambda index: index["weight_map"].update({"proj_out.bias": first.name}))
    assert "holds no proj_out.bias, which" in refused(folder)


def test_an_index_without_tensors(folder: Path) -> None:
    change(folder / INDEX, lambda index: index.update(weight_map={}))
    assert "names no tensor" in refused(folder)


def test_no_weights(folder: Path) -> None:
    for path in [folder / INDEX, *folder.glob("*.safetensors")]:
        path.unlink()
    assert f"neither {ONE_FILE} nor" in refused(folder)


@pytest.mark.parametrize("blocks", [5, 7])
def test_a_config_that_lies_about_its_blocks(folder: Path, blocks: int) -> None:
    change(folder / "config.json", lambda config: config.update(num_layers=blocks))
    assert f"config.json says {blocks} blocks in transformer_blocks and the weights hold 6" in refused(folder)


def _holding(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


NAME = "transformer_blocks.3.img_mlp.net.2.weight"


def test_a_wrong_shape(folder: Path) -> None:
    rewrite(_holding(folder, NAME), lambda tensors: tensors.update({NAME: tensors[NAME][:, :100].clone()}))
    assert f"{NAME} is [32, 100] here and [32, 128] in QwenImageTransformer2DModel" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_holds_no_weights(folder: Path, dtype: torch.dtype) -> None:
    rewrite(_holding(folder, NAME), lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    assert "which cannot hold this weight" in refused(folder)


def test_a_shard_of_another_dtype(folder: Path) -> None:
    rewrite(_holding(folder, NAME), lambda tensors: tensors.update({NAME: tensors[NAME].half()}))
    assert (
        "as float16 and transformer_blocks.0.img_mlp.net.2.weight as float32; the shards are not of one"
        in (refused(folder))
    )


def test_a_name_too_many_and_one_missing(folder: Path) -> None:
    shard = _holding(folder, "proj_out.bias")
    rewrite(shard, lambda tensors: tensors.update({"proj_out.bais": tensors.pop("proj_out.bias")}))
    change(folder / INDEX, lambda index: index["weight_map"].update({"proj_out.bais": shard.name}))
    change(folder / INDEX, lambda index: index["weight_map"].pop("proj_out.bias"))
    assert "lack proj_out.bias, which QwenImageTransformer2DModel has (did you mean 'proj_out" in refused(
        folder
    )


def test_building_a_skeleton_leaves_torch_as_it_was(sharded: Path) -> None:
    register, dtype = nn.Module.register_parameter, torch.get_default_dtype()
    open_source(str(sharded)).checkpoint(torch.bfloat16)
    assert nn.Module.register_parameter is register and torch.get_default_dtype() is dtype
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("size", ["200KB", "1GB"])
def test_a_variant_alone_is_refused_by_its_name(tmp_path: Path, size: str) -> None:
    model: Any = models.tiny_qwen(blocks=2)[0]
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    line = refused(tmp_path)
    assert "holds a variant of the weights alone" in line and "from_pretrained(..., variant='fp16')" in line
    type(model).from_pretrained(tmp_path, variant="fp16").save_pretrained(tmp_path / "plain")  # the advice
    assert fingerprint(open_source(str(tmp_path / "plain")).transformer()) == fingerprint(model)


def test_a_tensor_in_two_shards_is_ambiguous(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    rewrite(second, lambda tensors: tensors.update({name: tensor * 2}))
    line = refused(folder)
    assert f"holds {name}, which {first.name} holds too" in line and "loaders differ" in line


def test_one_file_with_two_dtypes_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    model: Any = models.tiny_qwen(blocks=2)[0]
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / ONE_FILE, lambda tensors: tensors.update({"img_in.bias": tensors["img_in.bias"].bfloat16()}))
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    source = open_source(str(tmp_path))
    assert fingerprint(source.transformer()) == source.checkpoint().fingerprint == fingerprint(expected)
