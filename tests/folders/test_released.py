"""The released layout: the golden case, round trips, the teacher joined again, and damaged folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.formats import released
from ppcl_fx.io.files import read_safetensors, write_safetensors
from ppcl_fx.io.shards import INDEX
from ppcl_fx.io.shards import ONE_FILE as WEIGHTS
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models
from tests.passes.by_hand import randomise

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "released_layout_tiny"
STACK = "transformer_blocks"
EDITS: list[Edit] = [
    DepthEdit(stack=STACK, first=1, last=2),
    DepthEdit(stack=STACK, first=5, last=6),
    FfnEdit(stack=STACK, block=0),
    FfnEdit(stack=STACK, block=5),
    TextStreamEdit(stack=STACK, source=3, last=4),
    TextStreamEdit(stack=STACK, source=7, last=9),
]


def golden_call() -> tuple[dict[str, Any], torch.Tensor]:
    tensors = read_safetensors(DATA / "released_layout_tiny_io.safetensors")
    kwargs = {
        "hidden_states": tensors["input.hidden_states"],
        "encoder_hidden_states": tensors["input.encoder_hidden_states"],
        "encoder_hidden_states_mask": torch.ones(2, 5),
        "timestep": tensors["input.timestep"],
        "img_shapes": [[(1, 3, 5)]] * 2,
    }
    return kwargs, tensors["output"]


def agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5. What is left comes from the sinusoids of the timestep: its last bit alone moves the output by 9e-5."""
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


def answer(model: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**{**kwargs, "return_dict": False})[0]
    assert isinstance(result, torch.Tensor)
    return result


@pytest.fixture(scope="module")
def pruned() -> tuple[Any, PluggableModel, dict[str, Any]]:
    """A teacher of ten blocks, and a pluggable model of it whose students are not the teacher's blocks any more."""
    teacher, kwargs = models.tiny_qwen(blocks=10)
    model = rewrite(trace(teacher, kwargs), Plan(edits=EDITS))
    randomise(model.graph)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.graph.get_submodule("students").parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator) * parameter.std(correction=0))
    return teacher, model, kwargs


@pytest.fixture(scope="module")
def folder(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pruned[1]
    model.plug(students=model.edits)
    return released.save_released(model, tmp_path_factory.mktemp("released") / "folder")


def test_the_golden_checkpoint_computes_what_its_own_class_does() -> None:
    kwargs, expected = golden_call()
    model = ppcl_fx.load(GOLDEN)
    assert isinstance(model, released.ReleasedModel)
    agrees(answer(model, kwargs), expected)
    assert model(**kwargs).sample.shape == expected.shape
    assert model.config.num_layers == 7
    assert model.config["ehs_proj_index"] == [4, 6]
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    held = read_safetensors(GOLDEN / WEIGHTS)
    assert model.param_count() == model.plan.params == sum(tensor.numel() for tensor in held.values())
    assert model.state_dict().keys() == held.keys()


def test_the_golden_checkpoint_opens_as_a_source_and_traces_again_where_it_must() -> None:
    kwargs, expected = golden_call()
    model = open_source(str(GOLDEN)).transformer()
    short = {**kwargs, "encoder_hidden_states_mask": None}
    agrees(answer(model, short), expected)
    # With a mask the call is another one than was traced.
    agrees(answer(model, kwargs), expected)
    one = {name: value[:1] for name, value in kwargs.items()}
    agrees(answer(model, one), expected[:1])


def test_kinds_of_call_that_come_in_turns_are_traced_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs, expected = golden_call()
    model = ppcl_fx.load(GOLDEN)
    traced: list[Any] = []
    monkeypatch.setattr(released, "trace", lambda *call: traced.append(call) or trace(*call))
    for _ in range(3):
        for mask in (kwargs["encoder_hidden_states_mask"], None):
            agrees(answer(model, {**kwargs, "encoder_hidden_states_mask": mask}), expected)
    assert len(traced) == 2
    model.to(torch.float64).to(torch.float32)
    agrees(answer(model, {**kwargs, "encoder_hidden_states_mask": None}), expected)
    agrees(answer(model, kwargs), expected)


def test_a_released_checkpoint_moves_and_trains() -> None:
    kwargs, expected = golden_call()
    model = released.load(GOLDEN, dtype=torch.float64)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    agrees(answer(model, double), expected)
    agrees(answer(model.float(), kwargs), expected)
    loss = model(**kwargs, return_dict=False)[0].square().mean()
    loss.backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert f"{STACK}.4.txt_proj.weight" in used
    assert f"{STACK}.3.attn.to_add_out.weight" not in used
    with torch.no_grad():
        model.get_parameter(f"{STACK}.4.txt_proj.weight").add_(0.5)
    assert not torch.allclose(answer(model, kwargs), expected, atol=1e-3)


def test_a_mixture_is_written_and_read_again(pruned: Any, folder: Path) -> None:
    teacher, model, kwargs = pruned
    config = json.loads((folder / "config.json").read_text())
    assert config["num_layers"] == 8
    assert config["single_stream_index"] == [3, 6, 7]
    assert config["ffn_proj_index"] == [0, 4]
    assert config["ehs_proj_index"] == [3, 7]
    loaded = ppcl_fx.load(folder)
    model.plug(students=model.edits)
    for given in (kwargs, models.other_kwargs(teacher)):
        assert torch.equal(answer(loaded, given), answer(model, given))
    # What the layout keeps and nothing uses: the text output projection of the three blocks without a text stream.
    unused = sum(p.numel() for p in teacher.transformer_blocks[0].attn.to_add_out.parameters())
    assert loaded.param_count() == model.param_count() + 3 * unused


def test_some_edits_alone_make_a_checkpoint_too(pruned: Any, tmp_path: Path) -> None:
    _, model, kwargs = pruned
    some = [edit.id for edit in EDITS if not isinstance(edit, DepthEdit)]
    loaded = released.load(released.save_released(model.plug(students=some), tmp_path / "wide"))
    assert torch.equal(answer(loaded, kwargs), answer(model, kwargs))
    assert loaded.config.num_layers == 10
    # Block 5's projectors belong to the student of 5-6, which is not plugged: the teacher's block is there, whole.
    assert loaded.config["ffn_proj_index"] == [0]


def test_with_its_teacher_every_edit_is_switchable(pruned: Any, folder: Path, tmp_path: Path) -> None:
    teacher, model, kwargs = pruned
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("pruned.json"))
    kept = [0, 1, 3, 4, 5, 7, 8, 9]
    sources: list[tuple[Path, dict[str, Any]]] = [
        (folder, {}),
        (bare, {"plan": Plan(edits=EDITS)}),
        (bare, {"kept": kept}),
        (bare, {}),  # told by the weights
    ]
    for place, said in sources:
        joined = released.with_teacher(place, teacher, kwargs, **said)
        assert set(joined.edits) == {edit.id for edit in EDITS}
        assert joined.students == tuple(joined.edits)
        mixtures = [joined.edits, [], [EDITS[0].id, EDITS[2].id], [EDITS[5].id]]
        for students in mixtures:
            ours, theirs = joined.plug(students=students), model.plug(students=students)
            assert torch.equal(answer(ours, kwargs), answer(theirs, kwargs))
            assert ours.param_count() == theirs.param_count()
    assert joined.plug(keep=0.9).param_count() <= 0.9 * joined.teacher_params


def test_a_teacher_that_is_another_one_is_refused(pruned: Any, folder: Path, tmp_path: Path) -> None:
    teacher, _, kwargs = pruned
    other, _ = models.tiny_qwen(seed=7, blocks=10)
    with pytest.raises(PpclError, match=r"is not the teacher's .*fine-tuned as a whole; load it alone"):
        released.with_teacher(folder, other, kwargs)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("pruned.json"))
    with pytest.raises(PpclError, match="does not show in its weights; give the plan"):
        released.with_teacher(bare, other, kwargs)
    with pytest.raises(PpclError, match="do not rise from 0"):
        released.with_teacher(bare, teacher, kwargs, kept=[0, 1, 3, 4, 5, 7, 9, 8])
    with pytest.raises(PpclError, match="has 8 blocks, and the plan leaves 9"):
        released.with_teacher(bare, teacher, kwargs, plan=Plan(edits=EDITS[1:]))
    with pytest.raises(PpclError, match=r"ffn_proj_index is \[0, 4\], and the plan makes it \[0\]"):
        released.with_teacher(bare, teacher, kwargs, plan=Plan(edits=[*EDITS[:3], *EDITS[4:]]))
    flux, flux_kwargs = models.tiny_flux()
    with pytest.raises(PpclError, match="the teacher is a FluxTransformer2DModel"):
        released.with_teacher(folder, flux, flux_kwargs)


def test_what_the_layout_cannot_say_is_refused(pruned: Any, tmp_path: Path) -> None:
    flux, kwargs = models.tiny_flux()
    model = rewrite(trace(flux, kwargs), Plan(edits=[DepthEdit(stack=STACK, first=1, last=2)]))
    with pytest.raises(PpclError, match="single_transformer_blocks"):
        released.save_released(model.plug(students=model.edits), tmp_path / "x")
    teacher, kwargs = models.tiny_qwen()
    edits: list[Edit] = [DepthEdit(stack=STACK, first=2, last=3), TextStreamEdit(stack=STACK, source=1, last=4)]
    model = rewrite(trace(teacher, kwargs), Plan(edits=edits))
    with pytest.raises(PpclError, match="plug both or neither"):
        released.save_released(model.plug(students=[edits[1].id]), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def _lists(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _outside(folder: Path) -> None:
    names = read_safetensors(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../" + WEIGHTS)}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lists(single_stream_index=[3, 4]), "ehs_proj_index has block 6, which single_stream_index does not have"),
        (_lists(single_stream_index=[3, 4, 9]), "single_stream_index has block 9, and num_layers is 7"),
        (_lists(single_stream_index=[0, 3, 4, 6]), "no block before it has a text stream"),
        (_lists(single_stream_index=[3, 3, 4, 6]), "has 3 twice"),
        (_lists(single_stream_index=[3, 4, 5, 6]), r"ehs_proj_index has 4 and 6, both in the group of blocks 3 to 6"),
        (_lists(single_stream_index=[3, 4, 6.5]), "single_stream_index.2"),
        (_lists(single_stream_index=[2, 3, 4, 6]), r"disagree with the weights: transformer_blocks\.2\.txt_proj"),
        (_lists(ffn_proj_index=[1]), r"transformer_blocks\.4\.img_mlp.* more are missing"),
        (_lists(ffn_proj_index=[1, 2, 4]), r"transformer_blocks\.2\.img_ffn_proj.* missing"),
        (_lists(ehs_proj_index=[4]), r"transformer_blocks\.6\.ehs_proj\.bias and 1 more are too much"),
        (_lists(num_layers=8), r"transformer_blocks\.7\..* missing"),
        (_lists(num_layers=0), "num_layers"),
        (_lists(joint_attention_dim=32), r"txt_in\.weight is \[32, 24\] and not \[32, 32\]|txt_norm"),
        (_lists(_class_name="QwenImageTransformer3DModel"), "did you mean 'QwenImageTransformer2DModel'"),
        (_cut, "truncated"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds neither .*safetensors nor .*index.json"),
        (_outside, "which is not beside it"),
    ],
)
def test_damaged_checkpoints_get_one_line(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    copied = shutil.copytree(GOLDEN, tmp_path / "copy")
    damage(copied)
    with pytest.raises(PpclError, match=words) as error:
        ppcl_fx.load(copied)
    assert "\n" not in str(error.value)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    copied = shutil.copytree(GOLDEN, tmp_path / "copy")
    tensors = read_safetensors(copied / WEIGHTS)
    names = sorted(tensors)
    parts = {"one.safetensors": names[:60], "two.safetensors": names[60:]}
    for file, held in parts.items():
        write_safetensors(copied / file, {name: tensors[name] for name in held})
    (copied / WEIGHTS).unlink()
    weight_map = {name: file for file, held in parts.items() for name in held}
    (copied / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    kwargs, expected = golden_call()
    agrees(answer(ppcl_fx.load(copied), kwargs), expected)
    (copied / "two.safetensors").unlink()
    with pytest.raises(PpclError, match="two.safetensors: no such file"):
        ppcl_fx.load(copied)
    write_safetensors(copied / "two.safetensors", {name: tensors[name] for name in names[61:]})
    with pytest.raises(PpclError, match="two.safetensors: holds no .*, which .* says it does"):
        ppcl_fx.load(copied)


def test_a_group_without_its_second_projector_passes_the_text_state_through(tmp_path: Path) -> None:
    """The authors' script leaves it out where a group ends in a removed block."""
    copied = shutil.copytree(GOLDEN, tmp_path / "copy")
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(copied / WEIGHTS).items()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if ".4.ehs_proj." in name}
    kwargs, expected = golden_call()
    write_safetensors(copied / WEIGHTS, {**tensors, **zero})
    with_zeros = answer(ppcl_fx.load(copied), kwargs)
    assert not torch.allclose(with_zeros, expected, atol=1e-4)
    write_safetensors(copied / WEIGHTS, {name: tensor for name, tensor in tensors.items() if name not in zero})
    _lists(ehs_proj_index=[6])(copied)
    assert torch.equal(answer(ppcl_fx.load(copied), kwargs), with_zeros)


def test_a_whole_pipeline_around_a_released_checkpoint_draws(tmp_path: Path) -> None:
    from tests.shapes_folder import save_pipeline

    whole = open_source(str(save_pipeline(tmp_path / "model"))).pipeline()
    calls = ppcl_fx.record(whole, ["a red circle"], num_inference_steps=2, seed=0)
    edits: list[Edit] = [DepthEdit(stack=STACK, first=1, last=2), TextStreamEdit(stack=STACK, source=3, last=5)]
    model = rewrite(trace(whole.transformer, calls.examples()), Plan(edits=edits), calls)
    model.plug(students=model.edits)
    pruned_folder = shutil.copytree(tmp_path / "model", tmp_path / "pruned", ignore=lambda *_: {"transformer"})
    released.save_released(model, pruned_folder / "transformer")
    pipeline = open_source(str(pruned_folder)).pipeline()
    assert isinstance(pipeline.transformer, released.ReleasedModel)
    assert isinstance(ppcl_fx.load(pruned_folder), released.ReleasedModel)
    whole.transformer = model
    ours, theirs = (ppcl_fx.record(p, ["a red circle"], num_inference_steps=2, seed=0) for p in (pipeline, whole))
    # The second step's input is the first step's answer.
    assert torch.equal(ours[-1].kwargs["hidden_states"], theirs[-1].kwargs["hidden_states"])
    with pytest.raises(PpclError, match="has no transformer blocks|holds no transformer blocks"):
        trace(pipeline.transformer, calls.examples())


# ---- in pipelines ----------------------------------------------------------------------------------------------


def test_a_released_checkpoint_answers_like_its_class_and_compiles() -> None:
    kwargs, _ = golden_call()
    model: Any = ppcl_fx.load(GOLDEN)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert (model.inner_dim, len(model.transformer_blocks), model.is_cache_enabled) == (width, 7, False)
    assert type(model.pos_embed).__name__ == "QwenEmbedRope"
    assert model.transformer_blocks[0].attn.to_q.weight is dict(model.named_parameters())[f"{STACK}.0.attn.to_q.weight"]
    assert not hasattr(model, "rope")
    expected = answer(ppcl_fx.load(GOLDEN), kwargs)
    # Before the first call, and for a call that is traced again.
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(answer(compiled, kwargs), expected)
    short = {**kwargs, "encoder_hidden_states_mask": None}
    assert torch.equal(answer(compiled, short), answer(ppcl_fx.load(GOLDEN), short))
    assert torch.equal(answer(torch.compile(model, backend="eager", fullgraph=True), short), answer(model, short))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call it once, then compile it"):
        answer(torch.compile(ppcl_fx.load(GOLDEN), backend="eager", fullgraph=True), kwargs)


def test_a_released_checkpoint_is_offloaded_whole_and_by_blocks() -> None:
    kwargs, _ = golden_call()
    expected = answer(ppcl_fx.load(GOLDEN), kwargs)
    model: Any = ppcl_fx.load(GOLDEN)
    _, hook = accelerate.cpu_offload_with_hook(model, "cpu")
    assert torch.equal(answer(model, kwargs), expected)
    hook.remove()
    model.enable_group_offload("cpu", num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(answer(model, kwargs), expected)
    with pytest.raises(PpclError, match="offloaded by blocks, so it is not moved"):
        model.to("cpu")
    leaves = accelerate.cpu_offload(ppcl_fx.load(GOLDEN), execution_device="cpu")
    with pytest.raises(PpclError, match=r"on the meta device: accelerate offloads it leaf by leaf.*remove_all_hooks"):
        leaves(**kwargs)
    assert torch.equal(answer(accelerate.hooks.remove_hook_from_module(leaves, recurse=True), kwargs), expected)


def test_attention_backends_of_a_released_checkpoint() -> None:
    kwargs, _ = golden_call()
    model: Any = ppcl_fx.load(GOLDEN)
    expected = answer(model, kwargs)
    try:
        model.set_attention_backend("_native_math")
        found = answer(model, kwargs)
        assert torch.allclose(found, expected, atol=1e-5) and not torch.equal(found, expected)
    finally:
        model.set_attention_backend("native")
        model.reset_attention_backend()
    assert torch.equal(answer(model, kwargs), expected)


def test_what_a_released_checkpoint_cannot_do_is_one_line(tmp_path: Path) -> None:
    model: Any = ppcl_fx.load(GOLDEN)
    for words, refused in {
        "its blocks are numbered anew; plug it into its teacher": lambda: model.load_lora_adapter({}),
        "no layerwise casting": lambda: model.enable_layerwise_casting(torch.float8_e4m3fn),
        "compile it whole": lambda: model.compile_repeated_blocks(),
        "copy the folder that it was loaded from": lambda: model.save_pretrained(tmp_path / "out"),
        "use offload_type='block_level'": lambda: model.enable_group_offload("cpu", offload_type="leaf_level"),
    }.items():
        with pytest.raises(PpclError, match=words):
            refused()
    assert not (tmp_path / "out").exists()
