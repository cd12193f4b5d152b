"""What is added to a stream between two blocks: the residuals of a ControlNet, by the teacher's block numbers.

A model adds them one after each block, from a list among its inputs. Where a run of blocks becomes one student, the
additions after the last block stay where they are, and those inside of the run would be lost with its blocks; so they
move behind the student, in their order: it gets the sum of the residuals of the blocks that it stands for.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch.fx import Node

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import ancestors, is_add
from ppcl_fx.ir.stacks import Block
from ppcl_fx.ir.switches import is_switch
from ppcl_fx.tracing.proxies import set_item

RESIDUAL = "ppcl_residual"


def residuals(blocks: Sequence[Block], stream: str) -> list[Node]:
    """Return what is added to a stream between consecutive blocks and comes from none of them, in order.

    Raises:
        Refusal: between two blocks the model writes into a part of the stream; a student would lose that.
    """
    own = {node for block in blocks for node in block.nodes}
    found: list[Node] = []
    for before, after in itertools.pairwise(blocks):
        if stream not in before.outputs or stream not in after.inputs:
            continue
        start, node = before.outputs[stream], after.inputs[stream]
        behind = ancestors([node], stop=[start])
        between: list[Node] = []
        while node is not start and start in behind:
            if node.target is set_item:
                raise Refusal(
                    f"between {before.path} and {after.path} the model writes into a part of the {stream} stream "
                    f"({node.name}), which a student of both would lose; end the interval at {before.path}"
                )
            step = _step_back(node, start)
            if step is None:
                break
            node, added = step
            if added is not None and not own & ancestors([added], stop=own):
                between.append(added)
        found += reversed(between)
    return found


def _step_back(node: Node, start: Node) -> tuple[Node, Node | None] | None:
    """Go from a node towards `start`; also return what was added on the way, if the node is an addition."""
    if is_switch(node):
        return node.args[0], None  # type: ignore[return-value]
    leading = [source for source in node.all_input_nodes if start in ancestors([source], stop=[start])]
    if len(leading) != 1:
        return None
    others = [source for source in node.all_input_nodes if source is not leading[0]]
    return leading[0], others[0] if is_add(node) and len(others) == 1 else None


def with_residuals(value: Node, added: Sequence[Node], after: Node) -> Node:
    """Return ``value + added[0] + added[1] + ...``, inserted behind a node that all of them come before."""
    graph = value.graph
    for residual in added:
        with graph.inserting_after(after):
            total = graph.call_function(operator.add, (value, residual))
        total.meta = {"val": value.meta.get("val"), RESIDUAL: True}
        value = after = total
    return value


def bare(value: Node) -> Node:
    """Return a student's own output: a value without the residuals that `with_residuals` added."""
    while value.meta.get(RESIDUAL):
        assert isinstance(value.args[0], Node)
        value = value.args[0]
    return value
