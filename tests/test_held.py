"""Teachers that something holds: hooks, wrappers, quantisation. One line that says what, and its advice works."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import distributed, nn

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.model.sources import open_source
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.tracing import trace
from tests import models
from tests.cli_place import Place
from tests.shapes_folder import save_pipeline

CPU = torch.device("cpu")
Hold = Callable[[Any], Any]


def sequential(model: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def whole(model: Any) -> Any:
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


def device_map(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def grouped(model: Any) -> Any:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    return model


def cached(model: Any) -> Any:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return model


def cast(model: Any) -> Any:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile_repeated_blocks(backend="eager")
    return model


def compiled_block(model: Any) -> Any:
    model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1], backend="eager")
    return model


def int8(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Packed(nn.Parameter):
    """As bitsandbytes, gguf and torchao keep weights: a kind of parameter of their own."""


def packed(model: Any) -> Any:
    model.img_in._parameters["weight"] = Packed(torch.zeros(32, 34, dtype=torch.uint8), requires_grad=False)
    return model


def configured(model: Any) -> Any:
    model.register_to_config(quantization_config={"quant_method": "torchao"})
    return model


def whole_numbers(model: Any) -> Any:
    model.img_in.weight = nn.Parameter(model.img_in.weight.detach().to(torch.int8), requires_grad=False)
    return model


def one_byte(model: Any) -> Any:
    return model.to(torch.float8_e5m2)


def replaced(model: Any) -> Any:
    block = model.transformer_blocks[1]
    block.forward = functools.partial(type(block).forward, block)
    return model


def parametrised(model: Any) -> Any:
    torch.nn.utils.parametrizations.weight_norm(model.transformer_blocks[1].img_mlp.net[2])
    return model


def weight_normed(model: Any) -> Any:
    hook = model.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda module, args: None)
    assert hook is not None
    return model


HOOK = accelerate.hooks.remove_hook_from_module
HELD: dict[Hold, str] = {
    sequential: r"the model is held by accelerate \(AlignDevicesHook.*pipe.remove_all_hooks\(\), or accelerate",
    whole: r"the model is held by accelerate \(CpuOffload",
    device_map: r"the model is held by accelerate \(AlignDevicesHook",
    grouped: r"held by diffusers' hook 'group_offloading' .*remove_hook\('group_offloading', recurse=True\)",
    cached: r"module 'transformer_blocks.0' is held by diffusers' hook 'fbc_.*take it off: model.disable_cache\(\)$",
    cast: r"is held by diffusers' hook 'layerwise_casting' .*remove_hook\('layerwise_casting', recurse=True\)",
    compiled: r"the model is wrapped by torch \(OptimizedModule\); give .* its attribute '_orig_mod'",
    compiled_block: r"module 'transformer_blocks.1' is wrapped by torch \(OptimizedModule\)",
    compiled_in_place: r"module 'transformer_blocks.0' is compiled in its place by compile\(\)",
    int8: r"the model keeps 'time_text_embed.*_packed_params.dtype' as dtype, and only plain floating-point weights",
    packed: r"the model keeps 'img_in.weight' as Packed, .*load the model unquantised",
    configured: r"the model is quantised \(torchao\), .*load it unquantised",
    whole_numbers: r"the model keeps 'img_in.weight' in int8",
    one_byte: r"the model keeps '.*weight' in float8_e5m2",
    replaced: r"module 'transformer_blocks.1' has a forward put in the place of its class's \(partial\)",
    parametrised: r"module 'transformer_blocks.1.img_mlp.net.2' computes its weight by a parametrization; .*remove_pa",
    weight_normed: r"module 'transformer_blocks.1.attn.to_q' has forward hooks \(.*<lambda>\), .*handle.remove\(\)",
}


def qwen() -> tuple[Any, dict[str, Any]]:
    return models.tiny_qwen(blocks=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hold", HELD, ids=lambda hold: hold.__name__)
def test_what_holds_a_teacher_is_named_in_one_line(hold: Hold) -> None:
    model, kwargs = qwen()
    with pytest.raises(PpclError, match=HELD[hold]) as refused:
        trace(hold(model), kwargs)
    assert "\n" not in str(refused.value)


def registry(model: Any, name: str) -> None:
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)


RELEASE: dict[Hold, Callable[[Any], Any]] = {
    sequential: lambda model: HOOK(model, recurse=True),
    whole: lambda model: HOOK(model, recurse=True),
    device_map: lambda model: HOOK(model, recurse=True),
    grouped: lambda model: registry(model, "group_offloading"),
    cached: lambda model: model.disable_cache(),
    compiled: lambda model: model._orig_mod,
    parametrised: lambda model: torch.nn.utils.parametrize.remove_parametrizations(
        model.transformer_blocks[1].img_mlp.net[2], "weight"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hold", RELEASE, ids=lambda hold: hold.__name__)
def test_what_the_line_advises_works(hold: Hold) -> None:
    model, kwargs = qwen()
    held = hold(model)
    released = RELEASE[hold](held)
    model = released if isinstance(released, nn.Module) and "img_in" in dict(released.named_children()) else held
    with torch.no_grad():
        found = ppcl_fx.PluggableModel(trace(model, kwargs), ppcl_fx.Plan())(**kwargs)[0]
        assert torch.allclose(found, qwen()[0](**kwargs)[0], rtol=0, atol=1e-5 if hold is parametrised else 0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("alone")
def test_sharded_teachers() -> None:
    model, kwargs = qwen()
    with pytest.raises(PpclError, match=r"wrapped by torch \(DistributedDataParallel\); .* its attribute 'module'"):
        trace(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), kwargs)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    with pytest.raises(PpclError, match=r"wrapped by torch \(FSDPQwen.*\); load the model again, and trace"):
        trace(sharded, kwargs)
    tensor = distributed.tensor.distribute_tensor(model.img_in.weight.detach(), mesh)
    model.img_in.weight = nn.Parameter(tensor)
    with pytest.raises(PpclError, match=r"keeps 'img_in.weight' as DTensor, .* in one piece"):
        trace(model, kwargs)


def test_training_and_checkpointing_are_no_hindrance() -> None:
    """Branches by ``training`` are those of a model in use."""
    model, kwargs = qwen()
    expected = model(**kwargs)[0]
    model.enable_gradient_checkpointing()
    gm = trace(model.train(), kwargs)
    assert gm.training and model.training
    inputs = {name: kwargs[name] for name in gm.meta["ppcl"]["inputs"]}
    assert torch.equal(gm.eval()(**inputs)[0], expected)
    assert trace(model.eval(), kwargs).code == gm.code


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hold", [sequential, whole, device_map, grouped], ids=lambda hold: hold.__name__)
def test_recording_a_held_teacher_works(hold: Hold, tmp_path: Path) -> None:
    pipeline = ShapesPipeline.from_pretrained(save_pipeline(tmp_path / "model"))
    plain = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=2)
    pipeline.transformer = hold(pipeline.transformer)
    calls = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=2)
    assert len(calls) == len(plain) > 0
    for one, other in zip(calls, plain, strict=True):
        assert one.kwargs.keys() == other.kwargs.keys()
        assert all(torch.equal(v, other.kwargs[n]) for n, v in one.kwargs.items() if isinstance(v, torch.Tensor))


QUANTISED: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gguf"}},
    {"quantization_config": {"weights_dtype": "int8"}},
    {"compression_config": {"quant_method": "compressed-tensors"}},
]


@pytest.mark.parametrize("entry", QUANTISED, ids=[json.dumps(entry)[:50] for entry in QUANTISED])
def test_a_quantised_checkpoint_is_refused_before_it_is_loaded(
    entry: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_pipeline(tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()  # nothing of it is opened
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    line = Place(tmp_path, capfd).refused("analyze", folder, "-o", tmp_path / "run", "--prompts", prompts)
    (how,) = entry.values()
    method = how.get("quant_method", "unknown method")
    assert f"says that the weights are quantised ({method})" in line
    assert "give the model that it was quantised from" in line
    assert not (tmp_path / "run").exists()
    shutil.copytree(folder / "transformer", tmp_path / "bare")
    with pytest.raises(PpclError, match="weights are quantised"):
        open_source(str(tmp_path / "bare"))
