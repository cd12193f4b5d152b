"""Depth-pruned models in folders that diffusers loads by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.formats.pruned import PRUNED, Pruned
from ppcl_fx.formats.stock import difference, save_stock
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan
from ppcl_fx.tracing import trace
from tests import models, toys

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}
CASES: dict[str, list[Edit]] = {
    "qwen": [DepthEdit(stack=DUAL, first=1, last=2), DepthEdit(stack=DUAL, first=3, last=5)],
    "flux": [DepthEdit(stack=DUAL, first=1, last=2), DepthEdit(stack=SINGLE, first=2, last=4)],
    # Block 1 of the dual-attention blocks 0-2 goes, and the list of them is numbered anew.
    "sd3": [DepthEdit(stack=DUAL, first=0, last=1), DepthEdit(stack=DUAL, first=4, last=6)],
}
LEFT = {
    "qwen": {"num_layers": 3},
    "flux": {"num_layers": 3, "num_single_layers": 3},
    "sd3": {"num_layers": 5, "dual_attention_layers": [0, 1]},
}


def pluggable(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model, its pluggable form with students that were trained a little, and a call."""
    teacher, kwargs = BUILD[name]()
    model = rewrite(trace(teacher, kwargs), Plan(edits=CASES[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.students_module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return teacher, model.plug(students=model.edits), kwargs


@pytest.mark.parametrize("name", list(CASES))
def test_diffusers_alone_loads_a_depth_student(name: str, tmp_path: Path) -> None:
    teacher, model, kwargs = pluggable(name)
    folder = save_stock(model, tmp_path / "student")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors", PRUNED]
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in LEFT[name]} == LEFT[name]
    loaded, info = getattr(diffusers, type(teacher).__name__).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in loaded.parameters()) == model.param_count()
    for given in (kwargs, models.other_kwargs(teacher)):
        with torch.no_grad():
            assert torch.equal(loaded(**given)[0], model(**given)[0])
    note = Pruned.model_validate_json((folder / PRUNED).read_text())
    assert note.plan.ids == model.edits
    assert note.params == model.param_count() == note.plan.params


def test_the_folder_is_a_teacher_for_the_next_pruning(tmp_path: Path) -> None:
    from ppcl_fx.model.sources import open_source

    _, model, kwargs = pluggable("qwen")
    again = open_source(str(save_stock(model, tmp_path / "student"))).transformer()
    with torch.no_grad():
        assert torch.equal(again(**kwargs)[0], model(**kwargs)[0])
    assert len(trace(again, kwargs).meta["ppcl"]["blocks"]) == 3


def test_a_width_edit_or_an_unknown_class_is_refused(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen()
    model = rewrite(trace(teacher, kwargs), Plan(edits=[*CASES["qwen"], FfnEdit(stack=DUAL, block=0)]))
    with pytest.raises(PpclError, match=r"ffn:transformer_blocks\.0 is plugged, and no class of diffusers"):
        save_stock(model.plug(students=model.edits), tmp_path / "x")
    depth = save_stock(model.plug(students=model.edits[:2]), tmp_path / "depth")
    assert json.loads((depth / "config.json").read_text())["num_layers"] == 3
    toy = rewrite(trace(toys.build(toys.Toy), toys.example()), Plan(edits=[DepthEdit(stack="blocks", first=0, last=1)]))
    with pytest.raises(PpclError, match="no diffusers configuration"):
        save_stock(toy.plug(students=toy.edits), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_reads_a_removed_block_from_elsewhere_is_refused(tmp_path: Path) -> None:
    """This class conditions its output with a part of block 0; a student of block 0 has a copy of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, sample_size=8
        ).eval()
    kwargs = {
        "hidden_states": torch.ones(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
        "return_dict": False,
    }
    plan = Plan(edits=[DepthEdit(stack=DUAL, first=0, last=1), DepthEdit(stack=DUAL, first=2, last=3)])
    model = rewrite(trace(teacher, kwargs), plan)
    with pytest.raises(PpclError, match="computes something else than the pruned model"):
        save_stock(model.plug(students=model.edits), tmp_path / "x")
    folder = save_stock(model.plug(students=model.edits[1:]), tmp_path / "y")
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**kwargs)[0], model(**kwargs)[0])


class ByNumber(toys.Toy):
    """Each block's output is scaled by its number: with fewer blocks the class computes something else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([toys.Block() for _ in range(count)])

    def forward(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Run the blocks."""
        for number, block in enumerate(self.blocks):
            x = block(x) * (number + 1)
        return (x,)


def test_a_class_that_counts_its_blocks_is_told_by_its_graph() -> None:
    """Where a block's number is part of what is computed, a shorter list is another model."""
    from ppcl_fx.formats.pruned import kept_blocks, renumbered, translated

    edit = DepthEdit(stack="blocks", first=0, last=1)
    for kind, words in ((ByNumber, "mul"), (None, "")):
        teacher = ByNumber(3) if kind else toys.build(toys.Toy)
        gm = trace(teacher, toys.example())
        model = rewrite(gm, Plan(edits=[edit])).plug(students=[edit.id])
        shorter = ByNumber(2) if kind else toys.build(toys.Toy)
        shorter.blocks = nn.ModuleList(list(shorter.blocks)[:2])
        blocks = gm.meta["ppcl"]["blocks"]
        paths = renumbered(blocks, kept_blocks(blocks, [edit]))
        apart = difference(
            model.graph_module(), trace(shorter, toys.example()), lambda path, paths=paths: translated(path, paths)
        )
        assert words in apart and bool(apart) == bool(words)
