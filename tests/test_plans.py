"""The paper's plans by name: exact counts at full size, near matches, and refusals with reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch.fx import GraphModule

import ppcl_fx
from ppcl_fx.cli.app import main
from ppcl_fx.cli.rewrite import Wish
from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.model.paper_plans import named, names
from ppcl_fx.model.pluggable import STUDENTS, PluggableModel
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import open_source
from ppcl_fx.passes.edits.plug import count
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.passes.selection.sensitivity import depth_damage, ffn_damage, text_damage
from ppcl_fx.schema.plan import DepthEdit
from ppcl_fx.tracing import trace
from tests import models
from tests.models import flux_kwargs, qwen_kwargs
from tests.passes.test_frontier import analysis_of, random_stack
from tests.shapes_folder import save_pipeline

pytestmark = pytest.mark.slow

PAPER = {
    "paper:qwen-image-12b": 11_934_618_688,
    "paper:qwen-image-11b": 10_905_704_512,
    "paper:qwen-image-10b": 10_528_131_136,
    "paper:qwen-image-baseline": 11_934_618_688,
    "paper:qwen-image-lp-a": 11_934_618_688,
    "paper:flux-dev-6.5b": 6_520_810_048,
}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.fixture(scope="module")
def qwen_image() -> GraphModule:
    """Qwen-Image at its full size, 20.43 B parameters, on the meta device."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel().eval()
    kwargs = qwen_kwargs(batch=1) | {
        "hidden_states": meta(1, 16, 64),
        "encoder_hidden_states": meta(1, 5, 3584),
        "timestep": meta(1),
    }
    return trace(model, kwargs)


@pytest.fixture(scope="module")
def flux_dev() -> GraphModule:
    """FLUX.1-dev at its full size, 11.9 B parameters, on the meta device."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).eval()
    kwargs = flux_kwargs(batch=1) | {
        "hidden_states": meta(1, 16, 64),
        "encoder_hidden_states": meta(1, 5, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "guidance": meta(1),
        "img_ids": meta(16, 3),
        "txt_ids": meta(5, 3),
    }
    return trace(model, kwargs)


@pytest.mark.parametrize("name", [name for name in PAPER if "qwen-image" in name])
def test_qwen_image_s_plans_have_the_paper_s_sizes(qwen_image: GraphModule, name: str) -> None:
    plan = named(name)
    plan.check(qwen_image)
    assert count(qwen_image, plan.plan()) == plan.params == PAPER[name]


def test_flux_dev_s_plan_is_the_printed_one_and_not_8_b(flux_dev: GraphModule) -> None:
    plan = named("paper:flux-dev-6.5b")
    plan.check(flux_dev)
    assert count(flux_dev, plan.plan()) == plan.params == PAPER[plan.name]
    with pytest.raises(Refusal, match=r"made for a model with 60 transformer_blocks, and this one has 19; analyse"):
        named("paper:qwen-image-12b").check(flux_dev)


def test_14_b_is_the_10_b_plan_with_students_swapped_back(qwen_image: GraphModule) -> None:
    big, small = named("paper:qwen-image-14b"), named("paper:qwen-image-10b")
    assert big.edits == small.edits
    assert "the paper does not say which" in big.plan().reason[0]
    plan = big.plan()
    plan.edits = [
        edit.model_copy(update={"damage": 1.0 if edit.id.endswith(".15-24") else 0.0}) for edit in plan.edits
    ]
    model = PluggableModel(insert_edits(qwen_image, plan), plan)
    students = big.students(model)
    assert 13_500_000_000 < model.param_count(students) <= 14_000_000_000
    # The most damaging one goes back first, and what stays cannot go back as well.
    assert "depth:transformer_blocks.15-24" not in students
    assert set(students) < set(model.edits)
    assert named("paper:qwen-image-12b").students(model) == model.edits


def test_the_overlapping_control_is_data_and_no_plan() -> None:
    control = named("paper:qwen-image-lp-b")
    spans = [(e.first, e.last) for e in control.edits if isinstance(e, DepthEdit)]
    assert spans == [(3, 4), (5, 9), (8, 10), (11, 13), (15, 24), (25, 28), (29, 31), (42, 44)]
    with pytest.raises(PpclError, match=r"lp-b: data of the paper that is no plan, because .*\[5, 9\] and \[8, 10\]"):
        control.plan()


def test_every_other_name_is_a_plan_whose_blocks_exist() -> None:
    for name in names():
        if name == "paper:qwen-image-lp-b":
            continue
        plan = named(name)
        assert plan.plan("middle").depth()[0].init == "middle"
        for edit in plan.edits:
            last = edit.last if hasattr(edit, "last") else edit.block
            assert last < plan.blocks[edit.stack]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("paper:qwen-image-12", "did you mean 'paper:qwen-image-12b'"),
        ("papre:flux-dev-6.5b", "did you mean 'paper:flux-dev-6.5b'"),
        ("paper:sdxl", "the plans by name are paper:qwen-image-12b, "),
    ],
)
def test_an_unknown_name_gets_a_near_match(name: str, words: str) -> None:
    with pytest.raises(PpclError, match=words):
        named(name)


@pytest.mark.parametrize(
    ("plan", "more", "words"),
    [
        ("paper:qwen-image-12", ["--calls", "c"], "did you mean 'paper:qwen-image-12b'"),
        ("paper:qwen-image-lp-b", ["--calls", "c"], "overlap"),
        ("paper:qwen-image-12b", [], "give recorded calls with --calls"),
        ("paper:qwen-image-12b", ["--calls", "c", "--keep", "0.5"], "a plan has its size already"),
        ("paper:qwen-image-12b", ["--calls", "c", "--init", "lsat"], "lsat: not one of first, middle"),
    ],
)
def test_the_program_refuses_in_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, plan: str, more: list[str], words: str
) -> None:
    code = main(["rewrite", "shapes", "--plan", plan, "-o", str(tmp_path / "x"), "--json", *more])
    out, _ = capfd.readouterr()
    assert code == 2
    assert re.search(words, json.loads(out)["error"])
    assert not (tmp_path / "x").exists()


def test_the_program_follows_a_plan_by_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As many blocks as Qwen-Image has, each of them tiny."""
    save_pipeline(tmp_path / "model", blocks=60)
    pipeline = open_source(str(tmp_path / "model")).pipeline()
    prompts = [f"a {colour} circle" for colour in ("red", "green", "blue", "yellow")]
    ppcl_fx.record(pipeline, prompts, num_inference_steps=2, seed=0).save(tmp_path / "calls")
    capfd.readouterr()
    command = ["rewrite", tmp_path / "model", "--calls", tmp_path / "calls", "-o", tmp_path / "student"]
    code = main([*map(str, command), "--plan", "paper:qwen-image-10b", "--json"])
    said = json.loads(capfd.readouterr().out)
    assert code == 0
    assert said["edits"] == said["plugged"] == named("paper:qwen-image-10b").plan().ids
    assert said["params"] < 0.55 * said["teacher_params"]
    assert said["reason"][0].startswith("paper:qwen-image-10b: ")
    for more in ([], ["--memory-limit", "6GiB"]):
        code = main([*map(str, command), "--plan", "paper:qwen-image-14b", "--json", "--overwrite", *more])
        assert code == 2
        assert "14,000,000,000 parameters are to stay" in json.loads(capfd.readouterr().out)["error"]
    command[-1] = tmp_path / "streamed"
    code = main([*map(str, command), "--plan", "paper:qwen-image-10b", "--json", "--memory-limit", "6GiB"])
    again = json.loads(capfd.readouterr().out)
    assert code == 0 and again == said | {"student": str(tmp_path / "streamed")}
    mine, theirs = (load_file(tmp_path / folder / STUDENTS) for folder in ("streamed", "student"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_model_without_such_blocks_is_refused() -> None:
    model, kwargs = models.tiny_qwen(blocks=2)
    gm = trace(model, kwargs)
    with pytest.raises(Refusal, match="made for a model with 38 single_transformer_blocks, and this one has none"):
        named("paper:flux-dev-6.5b").model_copy(update={"blocks": {"single_transformer_blocks": 38}}).check(gm)


def test_an_analysis_beside_the_name_says_what_each_edit_costs(tmp_path: Path) -> None:
    """Then a budget swaps back the students that do most damage, and not the plan's last ones."""
    stack = random_stack(1, 60, "transformer_blocks", grows=True)
    analysis = analysis_of(stack)
    analysis.save(tmp_path / "analysis.json")
    wish, config = Wish(analysis=tmp_path / "analysis.json", plan="paper:qwen-image-14b"), RewriteConfig()
    plan = wish.plan_given(wish.named(config), config)
    assert plan is not None and plan.model == analysis.model
    assert plan.ids == named("paper:qwen-image-10b").plan().ids
    damages = {edit.id: edit.damage for edit in plan.edits}
    assert damages["depth:transformer_blocks.15-24"] == depth_damage(stack, (15, 24), "image")
    assert damages["ffn:transformer_blocks.2"] == ffn_damage(stack, 2)
    assert damages["ffn:transformer_blocks.58"] == ffn_damage(stack, 58, text=False)
    assert damages["text_stream:transformer_blocks.40-41"] == text_damage(stack, 40, 41)
    assert wish.calls_beside() == tmp_path / "calls"
