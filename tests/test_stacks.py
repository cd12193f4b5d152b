"""Stacks: found in traced and in exported graphs, with the same names and streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.ir.sites import ffn_sites, text_site
from ppcl_fx.ir.stacks import stacks
from ppcl_fx.passes.edits.depth import CutDepth, interval
from ppcl_fx.tracing import trace
from tests import models, toys

BLOCKS = 4


@pytest.fixture(scope="module")
def qwen() -> GraphModule:
    return trace(*models.tiny_qwen())


@pytest.fixture(scope="module")
def flux() -> GraphModule:
    return trace(*models.tiny_flux())


@pytest.fixture(scope="module")
def sd3() -> GraphModule:
    return trace(*models.tiny_sd3())


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, dict[str, Any], GraphModule]:
    model, kwargs = models.tiny_qwen(blocks=BLOCKS)
    program = torch.export.export(model, (), kwargs, strict=False)
    gm = program.module()
    assert isinstance(gm, GraphModule)
    return model, kwargs, gm


def summary(gm: GraphModule) -> list[tuple[str, tuple[str, ...], list[int]]]:
    return [(s.name, s.streams, [block.index for block in s.blocks]) for s in stacks(gm)]


def test_qwen_image_is_one_stack(qwen: GraphModule) -> None:
    assert summary(qwen) == [("transformer_blocks", ("image", "text"), [0, 1, 2, 3, 4, 5])]


def test_flux_has_a_stack_of_each_kind(flux: GraphModule) -> None:
    assert summary(flux) == [
        ("transformer_blocks", ("image", "text"), [0, 1, 2, 3]),
        ("single_transformer_blocks", ("image", "text"), [0, 1, 2, 3, 4]),
    ]


def test_sd3_splits_where_dual_attention_ends_and_before_the_last_block(sd3: GraphModule) -> None:
    assert summary(sd3) == [
        ("transformer_blocks:0-2", ("image", "text"), [0, 1, 2]),
        ("transformer_blocks:3-6", ("image", "text"), [3, 4, 5, 6]),
        ("transformer_blocks:7-7", ("image",), [7]),
    ]


@pytest.mark.parametrize("name", ["qwen", "flux", "sd3"])
def test_streams_chain_from_block_to_block(name: str, request: pytest.FixtureRequest) -> None:
    for stack in stacks(request.getfixturevalue(name)):
        for before, after in zip(stack.blocks, stack.blocks[1:], strict=False):
            assert before.path == f"{before.stack}.{before.index}"
            for stream in stack.streams:
                assert after.inputs[stream] is before.outputs[stream]
        for block in stack.blocks:
            assert set(block.outputs) == set(stack.streams)
            for stream, leaving in block.outputs.items():
                assert leaving in block.nodes
                assert block.inputs[stream] not in block.nodes
                assert leaving.meta["val"].shape == block.inputs[stream].meta["val"].shape


def test_the_image_stream_is_the_one_with_the_picture_in_it(qwen: GraphModule) -> None:
    block = stacks(qwen)[0].blocks[2]
    assert block.outputs["image"].meta["val"].shape == (2, 16, models.WIDTH)
    assert block.outputs["text"].meta["val"].shape == (2, 5, models.WIDTH)


def test_an_interval_stays_in_its_stack(sd3: GraphModule) -> None:
    found = stacks(sd3)
    assert [block.index for block in interval(found, "transformer_blocks", 3, 6)] == [3, 4, 5, 6]
    with pytest.raises(Refusal, match=r"\[2, 3\] of transformer_blocks leaves its stack transformer_blocks:0-2"):
        interval(found, "transformer_blocks", 2, 3)
    with pytest.raises(Refusal, match="has no block 8; its blocks are 0 to 7"):
        interval(found, "transformer_blocks", 6, 8)
    with pytest.raises(Refusal, match=r"no blocks 'transformer_block' \(did you mean 'transformer_blocks'\?\)"):
        interval(found, "transformer_block", 0, 1)


def test_a_graph_without_blocks_is_refused() -> None:
    with pytest.raises(PpclError, match="holds no transformer blocks"):
        stacks(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_a_hand_written_model_has_one_stream() -> None:
    gm = trace(toys.build(toys.Toy), toys.example())
    assert summary(gm) == [("blocks", ("image",), [0, 1, 2])]


@pytest.mark.parametrize(
    ("name", "path", "streams"),
    [
        ("qwen", "transformer_blocks.5", {"image", "text"}),
        ("flux", "transformer_blocks.3", {"image", "text"}),
        ("flux", "single_transformer_blocks.4", set()),
        ("sd3", "transformer_blocks.0", {"image", "text"}),
        ("sd3", "transformer_blocks.7", {"image"}),
    ],
)
def test_feed_forwards_are_found_where_they_stand_alone(
    name: str, path: str, streams: set[str], request: pytest.FixtureRequest
) -> None:
    gm = request.getfixturevalue(name)
    block = next(b for s in stacks(gm) for b in s.blocks if b.path == path)
    sites = ffn_sites(gm, block)
    assert {site.stream for site in sites} == streams
    for site in sites:
        assert site.before in block.nodes
        assert site.before.meta["val"].shape == site.after.meta["val"].shape


def test_a_modulation_may_know_the_sizes_of_the_stream_that_it_modulates() -> None:
    temb = torch.randn(2, 6, 2 * toys.WIDTH, generator=torch.Generator().manual_seed(0))
    gm = trace(toys.build(toys.ModulatesTokens), {**toys.example(), "temb": temb})
    assert [len(ffn_sites(gm, block)) for block in stacks(gm)[0].blocks] == [1, 1, 1]


def test_the_text_site_is_what_feeds_the_text_projections(qwen: GraphModule, flux: GraphModule) -> None:
    site = text_site(qwen, stacks(qwen)[0].blocks[1])
    assert site.attention.target == "transformer_blocks.1.attn"
    assert site.attention.kwargs["encoder_hidden_states"] is site.z
    single = stacks(flux)[1].blocks[0]
    with pytest.raises(Refusal, match=r"the attention of single_transformer_blocks\.0 takes no argument"):
        text_site(flux, single)


def test_an_exported_graph_has_the_same_stack(exported: tuple[nn.Module, dict[str, Any], GraphModule]) -> None:
    assert summary(exported[2]) == [("transformer_blocks", ("image", "text"), list(range(BLOCKS)))]


def test_cutting_blocks_of_an_exported_graph_is_exact(
    exported: tuple[nn.Module, dict[str, Any], GraphModule],
) -> None:
    _, kwargs, gm = exported
    assert CutDepth("transformer_blocks", 1, 2)(gm).modified
    shorter, _ = models.tiny_qwen(blocks=BLOCKS)
    del shorter.transformer_blocks[2]  # type: ignore[operator,union-attr]
    with torch.no_grad():
        assert torch.equal(gm(**kwargs)[0], shorter(**kwargs)[0])
    assert sum(p.numel() for p in gm.parameters()) == sum(p.numel() for p in shorter.parameters())
    assert not CutDepth("transformer_blocks", 1, 2)(gm).modified
