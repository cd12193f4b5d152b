"""Width edits of the first kind: the feed-forwards of a block become linear projectors (Eq. 9)."""

from __future__ import annotations

import operator
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.sites import ffn_sites
from ppcl_fx.ir.switches import insert_switch, switches
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.schema.plan import FfnEdit


def add_projector(gm: GraphModule, path: str, source: Node, after: Node) -> Node:
    """Insert ``h + W h + b`` behind the node `after`, ``W`` and ``b`` zero at first, and return the node of the sum.

    The graph module gets an `nn.Linear` at `path`, in its dtype and on its device; ``h`` is
    the value of `source`, ``[batch, tokens, channels]``.
    """
    width = int(source.meta["val"].shape[-1])
    like = next(gm.parameters())
    linear = nn.utils.skip_init(nn.Linear, width, width, dtype=like.dtype, device=like.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    gm.add_submodule(path, linear)
    with gm.graph.inserting_after(after):
        product = gm.graph.call_module(path, (source,))
    with gm.graph.inserting_after(product):
        total = gm.graph.call_function(operator.add, (source, product))
    for node in (product, total):
        node.meta = {"val": source.meta["val"], "nn_module_stack": OrderedDict({path: (path, nn.Linear)})}
    return total


def projector_path(edit_id: str, part: str = "") -> str:
    """Return the module path of one projector of an edit; of what holds all of them if no part is given."""
    whole = f"projectors.{edit_id.replace(':', '_').replace('.', '_').replace('-', '_')}"
    return f"{whole}.{part}" if part else whole


@dataclass(frozen=True)
class Ffn(Pass, name="ffn", kind="rewrite", numerics="exact"):
    """Put a switchable linear projector beside the feed-forward of every stream of a block.

    ``h <- h + W h + b`` on the state after the gated attention residual: no norm, no modulation, no gate. When it is
    plugged, the feed-forward's half of the modulation has no reader and `Narrow` drops it. Idempotent.
    """

    stack: str
    block: int

    @property
    def edit(self) -> FfnEdit:
        """The plan's line for this pass."""
        return FfnEdit(stack=self.stack, block=self.block)

    def apply(self, gm: GraphModule) -> Result:
        if switches(gm, self.edit.id):
            return Result(gm, False)
        context = Context.of(gm)
        block = context.block(self.edit.id, self.stack, self.block)
        context.begin()
        sites = ffn_sites(gm, block)
        if not sites:
            raise Refusal(
                f"{block.path} has no feed-forward that stands alone (outputs "
                f"{', '.join(n.name for n in block.outputs.values())}): it runs beside the attention or is missing; "
                "choose another block"
            )
        for site in sites:
            path = projector_path(self.edit.id, site.stream)
            student = add_projector(gm, path, site.before, site.before)
            insert_switch(site.after, student, self.edit.id, block.path, site.stream)
        context.keep_stacks()
        return Result(gm, True)
