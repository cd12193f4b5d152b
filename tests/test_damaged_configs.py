"""Configurations that are damaged: one line each, before memory or time are spent, in every folder that holds one."""

from __future__ import annotations

import inspect
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import ppcl_fx
from ppcl_fx.errors import PpclError
from ppcl_fx.formats.components import load_model
from ppcl_fx.formats.released import save_released
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.configurations import LARGEST, check_config
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.student_folder import StudentFolder
from ppcl_fx.schema.plan import DepthEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import skeleton
from tests import models
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.slow

LOADING = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
STACK = "transformer_blocks"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("damaged") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, kwargs = models.tiny_qwen()
    plan = Plan(edits=[DepthEdit(stack=STACK, first=1, last=2)])
    return rewrite(trace(model, kwargs), plan).save(tmp_path_factory.mktemp("students") / "student")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(load: Callable[[], Any], *words: str) -> str:
    """The call is refused within seconds, in one line that holds these words."""
    begun = time.monotonic()
    with pytest.raises(PpclError) as caught:
        load()
    line = str(caught.value)
    assert time.monotonic() - begun < 5 and "\n" not in line
    assert all(word in line for word in words), line
    return line


TRANSFORMER: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"num_layers": "6"}, "num_layers is '6', and QwenImageTransformer2DModel takes int"),
    "truth for a number": ({"num_layers": True}, "num_layers is True"),
    "nothing": ({"num_attention_heads": None}, "num_attention_heads is None"),
    "list for a number": ({"patch_size": [1]}, "patch_size is [1]"),
    "number for a list": ({"axes_dims_rope": 16}, "axes_dims_rope is 16"),
    "text in a list": ({"axes_dims_rope": [4, 6, "6"]}, "axes_dims_rope is [4, 6, '6']"),
    "object": ({"out_channels": {}}, "out_channels is {}"),
    "number for a truth": ({"guidance_embeds": 3}, "guidance_embeds is 3"),
    "a slip": ({"num_layer": 6}, "takes no 'num_layer' (did you mean 'num_layers'?)"),
    "100 000 layers": ({"num_layers": 100_000}, "the stored weights are fewer"),
    "one layer more": ({"num_layers": 7}, "config.json says 7 blocks in transformer_blocks and the weights hold 6"),
    "a billion": ({"num_layers": 10**9}, "beyond all that can be built"),
    "many digits": ({"num_layers": 10**100}, "a number of many digits"),
    "wide": ({"attention_head_dim": 10**6}, "asks for a tensor of"),
    "a table of gigabytes": ({"axes_dims_rope": [4, 6, 10**6]}, "asks for a tensor of"),
    "negative": ({"attention_head_dim": -16}, "refuses this configuration"),
    "another width": ({"attention_head_dim": 8}, "is [32, 256] here and [16, 256]"),
    "odd axes": ({"axes_dims_rope": [4, 6, 8]}, "does not draw"),
}


@pytest.mark.parametrize("case", TRANSFORMER)
def test_a_transformers_config(folder: Path, case: str) -> None:
    changes, reason = TRANSFORMER[case]
    path = folder / "transformer" / "config.json"
    before = json.loads(path.read_text())
    edit(path, **changes)
    if case == "a slip":
        path.write_text(json.dumps({n: v for n, v in before.items() if n != "num_layers"} | changes))
    if case == "odd axes":  # fits the weights, and fails where it is called
        from ppcl_fx.cli.analyze import _record
        from ppcl_fx.cli.terminal import Terminal
        from ppcl_fx.passes.options import AnalyzeConfig

        source = open_source(str(folder))
        refused(
            lambda: _record(source, ["a"], AnalyzeConfig(batch_size=1, steps=1, seed=0), Terminal(False)),
            reason,
            str(folder),
        )
        return
    tracemalloc.start()
    for load in ("transformer", "checkpoint", "pipeline"):
        line = refused(getattr(open_source(str(folder)), load), reason)
        assert str(path) in line or "weights hold 6" in line or ".safetensors" in line
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("part", "file", "changes", "reason"),
    [
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 10**9}, "beyond all that can be built"),
        ("scheduler", "scheduler_config.json", {"shift": [3]}, "shift is [3]"),
        ("scheduler", "scheduler_config.json", {"time_shift_type": "sideways"}, "time_shift_type"),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": -5}, "cannot be loaded"),
        ("text_encoder", "config.json", {"channels": "16"}, "channels is '16'"),
        ("text_encoder", "config.json", {"words": 10**7}, "asks for a tensor of"),
        ("text_encoder", "config.json", {"channels": 17}, "cannot be loaded"),
    ],
)
def test_a_part_of_a_pipeline(folder: Path, part: str, file: str, changes: dict[str, Any], reason: str) -> None:
    edit(folder / part / file, **changes)
    line = refused(open_source(str(folder)).pipeline, reason)
    assert str(folder) in line


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip") / "text_encoder"
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"num_hidden_layers": 100_000}, "the stored weights are fewer"),
        ({"num_hidden_layers": 10**9}, "beyond all that can be built"),
        ({"num_hidden_layers": 4}, "missing keys"),
        ({"num_hidden_layers": 2}, "unexpected keys"),
        ({"num_hidden_layers": "3"}, "refuses this configuration"),
        ({"num_attention_heads": 3}, "refuses this configuration"),
        ({"hidden_size": 32}, "cannot be loaded"),
        ({"hidden_size": 10**6}, "the stored weights are fewer"),
        ({"hidden_act": "none such"}, "refuses this configuration"),
    ],
)
def test_a_text_encoder_of_transformers(
    text_encoder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "text_encoder")
    edit(folder / "config.json", **changes)
    if not changes:
        theirs = CLIPTextModel.from_pretrained(text_encoder).state_dict()
        ours = load_model(CLIPTextModel, folder, LOADING).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        return
    refused(lambda: load_model(CLIPTextModel, folder, LOADING), reason, str(folder))


def test_an_index_of_a_text_encoder_stays_in_its_folder(text_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_encoder, tmp_path / "text_encoder")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for place, reason in (("../elsewhere.safetensors", "not beside it"), ("gone.safetensors", "no such file")):
        index = {"metadata": {}, "weight_map": {"a.weight": place}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(lambda: load_model(CLIPTextModel, folder, LOADING), reason)


def test_a_students_folder(student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(student, tmp_path / "student")
    card = json.loads((folder / "ppcl.json").read_text())
    kwargs = models.qwen_kwargs()
    with torch.no_grad():
        expected = ppcl_fx.load(student)(**kwargs)[0]

    def both(*words: str) -> None:
        for load in (ppcl_fx.load, StudentFolder.open):
            refused(lambda load=load: load(folder), *words)  # type: ignore[misc]

    tokens = card["example"]["hidden_states"]["tensor"]
    for example, reason in (
        ({"hidden_states": {"tensor": {**tokens, "shape": [2, -16, 16]}}}, "example.hidden_states"),
        ({"hidden_states": {"tensor": {**tokens, "shape": [2, True, 16]}}}, "example.hidden_states"),
        ({"hidden_states": {"tensor": {**tokens, "shape": [2**20, 2**20]}}}, "example.hidden_states"),
        ({"hidden_states": {"tensor": {**tokens, "dtype": "float33"}}}, "did you mean 'float32'"),
        ({"hidden_states": {"tensor": {**tokens, "shape": [2, 15, 16]}}}, "does not take this call"),
        ({"hidden_states": {"value": 7}}, "does not take this call"),
        ({"img_shapes": {"list": [{"list": [{"tuple": [{"value": n} for n in (3000, 3000, 3000)]}]}] * 2}}, "asks for"),
        ({"img_shapes": {"list": [{"list": [{"tuple": [{"value": n} for n in (1, 10**9, 4)]}]}] * 2}}, "beyond all"),
        ({"hidden_state": {"value": 7}}, "takes no argument 'hidden_state' (did you mean 'hidden_states'?)"),
    ):
        (folder / "ppcl.json").write_text(json.dumps({**card, "example": {**card["example"], **example}}))
        both(reason)
    (folder / "ppcl.json").write_text(json.dumps(card))
    config = folder / "teacher" / "config.json"
    whole = config.read_text()
    for changes, reason in (({"num_layers": 10**5}, "stored weights are fewer"), ({"num_layers": 5.5}, "is 5.5")):
        edit(config, **changes)
        both(reason)
    config.write_text(whole)
    with torch.no_grad():
        assert torch.equal(ppcl_fx.load(folder)(**kwargs)[0], expected)


def test_a_released_folder(tmp_path: Path) -> None:
    model, kwargs = models.tiny_qwen()
    plan = Plan(edits=[TextStreamEdit(stack=STACK, source=3, last=5)])
    pluggable = rewrite(trace(model, kwargs), plan)
    save_released(pluggable.plug(students=pluggable.edits), tmp_path / "released")
    config = tmp_path / "released" / "config.json"
    whole = config.read_text()
    for changes, reason in (
        ({"num_layers": 100_000}, "the stored weights are fewer"),
        ({"attention_head_dim": "16"}, "attention_head_dim is '16'"),
        ({"joint_attention_dim": 10**8}, "beyond all that can be built"),
        ({"joint_attention_dim": 10**7}, "the stored weights are fewer"),
    ):
        config.write_text(whole)
        edit(config, **changes)
        refused(lambda: ppcl_fx.load(tmp_path / "released"), reason, str(config))


CLASSES = [
    kind
    for module in (diffusers.models, diffusers.schedulers)
    for name in dir(module)
    if inspect.isclass(kind := getattr(module, name)) and issubclass(kind, diffusers.ConfigMixin)
]


def test_every_class_takes_its_own_defaults() -> None:
    assert len(CLASSES) > 150
    for kind in CLASSES:
        parameters = inspect.signature(kind.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        check_config(kind, json.loads(json.dumps(defaults, default=list)), kind.__name__)


def test_what_a_class_takes() -> None:
    class Kind(nn.Module):
        def __init__(
            self,
            a: int = 1,
            b: float = 1.0,
            c: tuple[int, ...] | None = None,
            d: list[str] = ["x"],  # noqa: B006
            e: int = None,  # type: ignore[assignment]  # noqa: RUF013
            f: str | dict[str, int] = "x",
        ) -> None: ...

    for name, good, bad in (
        ("a", [3, 3.0], [3.5, "3", None, True, [3]]),
        ("b", [1, 2.5, 1e300], ["1", True, None]),
        ("c", [None, [], [1, 2]], [1, [1.5], ["1"], {}]),
        ("d", [[], ["a", "b"]], ["a", [1], None]),
        ("e", [None, 2], ["2", 2.5]),
        ("f", ["", {"a": 1}], [None, 1, []]),
    ):
        for value in good:
            check_config(Kind, {name: value, "unknown": 1}, "file")
        for value in bad:
            refused(lambda name=name, value=value: check_config(Kind, {name: value}, "file"), f"file: {name} is ")  # type: ignore[misc]
    check_config(Kind, {"b": LARGEST, "c": [LARGEST]}, "file")
    refused(lambda: check_config(Kind, {"c": [1, LARGEST + 1]}, "file"), "beyond all")


def test_room_holds_the_model_that_is_stored() -> None:
    for build in (models.tiny_qwen, models.tiny_flux, models.tiny_sd3):
        model, _ = build()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        made = skeleton(type(model), dict(model.config), torch.float32, room=Room.of(shapes), where="file")  # type: ignore[arg-type]
        assert {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()} == shapes
        assert all(parameter.is_meta for parameter in made.parameters())
        before, after = dict(model.named_buffers()), dict(made.named_buffers())
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
