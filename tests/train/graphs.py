"""A small distillation graph written by hand: four teacher blocks in a row, and two students beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ppcl_fx.train.core.distillation_graph import pairs

WIDTH = 8
EDITS = ("depth:blocks.0-1", "depth:blocks.2-3")


class TinyBlock(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add the layer's output to its input."""
        return x + torch.tanh(self.linear(x))


def distillation_graph(*, sequential: bool = False, seed: int = 0) -> GraphModule:
    """Blocks 0-1 and 2-3 each get one student; it is fed by the teacher, or by the student before it."""
    root = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(4):
            root.add_module(f"t{i}", TinyBlock().requires_grad_(False))
        for i in range(2):
            root.add_module(f"s{i}", torch.fx.symbolic_trace(TinyBlock()))
    graph = Graph()
    x = graph.placeholder("x")
    teacher = [x]
    for i in range(4):
        teacher.append(graph.call_module(f"t{i}", (teacher[-1],)))
    s0 = graph.call_module("s0", (x,))
    p0 = graph.call_function(pairs, (EDITS[0], (("image", s0, teacher[2]),)))
    s1 = graph.call_module("s1", (s0 if sequential else teacher[2],))
    p1 = graph.call_function(pairs, (EDITS[1], (("image", s1, teacher[4]), ("linear.image", s1, teacher[4]))))
    graph.output((p0, p1))
    gm = GraphModule(root, graph)
    gm.meta["ppcl"] = {"inputs": ["x"], "fixed": {}}
    return gm


def inputs(seed: int = 1, batch: int = 3) -> dict[str, Any]:
    """A batch for the graph."""
    return {"x": torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed))}
