"""What graphs and their nodes know: the typed way to ``gm.meta["ppcl"]`` and ``node.meta["ppcl"]``."""

from __future__ import annotations

from typing import Any, TypedDict, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node


class GraphInfo(TypedDict, total=False):
    """What a trace noted about its model, and what passes added (see `ppcl_fx.tracing.trace`)."""

    inputs: list[str]
    fixed: dict[str, Any]
    ones: dict[str, tuple[Any, torch.dtype]]
    blocks: list[str]
    signature: list[str]
    example: dict[str, Any]
    config: dict[str, Any]
    kept: list[str]
    unused: dict[str, torch.Tensor]
    model: str
    kinds: dict[Any, GraphModule]
    passes: list[dict[str, Any]]
    """The passes that changed the graph: ``name``, ``options`` and ``version`` of each."""
    names: dict[str, str]
    """Old name -> new name of the weights that passes copied."""
    marked: bool
    """Whether nodes say what the model computes without using it."""
    ends: dict[str, dict[str, str]]
    """For each block of the teacher the name of the node that each stream leaves it by."""
    alone: str
    """What a graph is that lacks blocks of its teacher."""
    mixture: tuple[Any, Any]
    """The plan and the plugged edits of a mixture."""


class NodeInfo(TypedDict, total=False):
    """What analyses found about the output of a block, or of a feed-forward."""

    fit: float
    energy: float
    cka: Any
    delta: Any
    gap: Any
    similarity: Any
    text_similarity: float | None
    candidate: Any
    ffn: Any


def graph_info(gm: nn.Module) -> GraphInfo:
    """Return what a graph module knows, to read and to write; nothing at first where it was not traced here."""
    assert isinstance(gm, GraphModule)
    return cast(GraphInfo, gm.meta.setdefault("ppcl", {}))


def node_info(node: Node) -> NodeInfo:
    """Return what analyses wrote on a node, to read and to write."""
    return cast(NodeInfo, node.meta.setdefault("ppcl", {}))
