"""Group offloading of a mixture: its graph in pieces, one a block, so that diffusers' hooks have modules to hang on.

Diffusers moves the weights of a block to the accelerator when the block is called. In a mixture no block is called: its
nodes lie open in one graph. So the graph is cut at its blocks, and the pieces are what is moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ppcl_fx.errors import PpclError


@dataclass(frozen=True)
class Offload:
    """How to offload, by diffusers' own names; see ``diffusers.hooks.apply_group_offloading``.

    Attributes:
        onload_device: where to compute.
        offload_device: where the weights rest.
        options: the other arguments.
    """

    onload_device: torch.device
    offload_device: torch.device
    options: Mapping[str, Any]


def offload(
    onload_device: str | torch.device, offload_device: str | torch.device, offload_type: str, options: Mapping[str, Any]
) -> Offload:
    """Check the arguments of ``enable_group_offload``.

    Raises:
        PpclError: offloading by leaves, or a way of finding blocks that a graph does not have.
    """
    if offload_type != "block_level":
        raise PpclError(
            f"a pluggable model is offloaded by blocks, not by {str(offload_type)!r}: some of its weights belong to no "
            "leaf module; use offload_type='block_level', num_blocks_per_group=1"
        )
    if options.get("block_modules") is not None:
        raise PpclError("the blocks of a pluggable model are known from its graph; leave block_modules out")
    wanted = {"num_blocks_per_group": 1} | {name: value for name, value in options.items() if value is not None}
    return Offload(torch.device(onload_device), torch.device(offload_device), wanted)


class Pieces(nn.Module):
    """A graph cut at its blocks; computes what the graph computes.

    Args:
        gm: a mixture; its modules and parameters are shared.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        from ppcl_fx.ir.partition import grouped, parts

        self.inputs: list[list[str]] = []
        self.outputs: list[list[str]] = []
        pieces = grouped(parts(node for node in gm.graph.nodes if node.op != "placeholder"))
        self.blocks = nn.ModuleList(self._piece(gm, piece) for piece in pieces)
        last = {name: at for at, names in enumerate(self.inputs) for name in names}
        self.dead = [[name for name, end in last.items() if end == at] for at in range(len(pieces))]
        self.train(gm.training)

    def _piece(self, gm: GraphModule, nodes: list[Node]) -> GraphModule:
        from ppcl_fx.ir.partition import carve

        carved, output = carve(nodes), gm.graph.output_node()
        final = nodes[-1] is output
        results = output.args[0] if final else tuple(carved.outputs)
        carved.graph.output(map_arg(results, carved.values.__getitem__))
        self.inputs.append([source.name for source in carved.inputs])
        self.outputs.append([] if final else [node.name for node in carved.outputs])
        return GraphModule(gm, carved.graph, class_name="Piece")

    def forward(self, **inputs: Any) -> Any:
        """Run the pieces one after the other, forgetting what no later one reads."""
        values = dict(inputs)
        result: Any = None
        for at, block in enumerate(self.blocks):
            result = block(*(values[name] for name in self.inputs[at]))
            values.update(zip(self.outputs[at], result, strict=False))
            for name in self.dead[at]:
                values.pop(name, None)
        return result


def announce(model: nn.Module, how: Offload) -> None:
    """Put diffusers' mark on a model whose parts are offloaded: by it pipelines find the device to compute on."""
    from diffusers.hooks import group_offloading as own

    kind = own.GroupOffloadingType.BLOCK_LEVEL
    config = own.GroupOffloadingConfig(how.onload_device, how.offload_device, kind, False, False, False)
    nothing = own.ModuleGroup([], how.offload_device, how.onload_device, offload_leader=model, onload_leader=model)
    own._apply_group_offloading_hook(model, nothing, config=config)


class GroupOffload(nn.Module):
    """What a model that computes by one graph is for ``enable_group_offload``."""

    _offload: Offload | None = None

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Keep the weights on one device and compute block by block on another.

        Args:
            onload_device: where to compute.
            offload_device: where the weights rest.
            offload_type: ``block_level``.
            options: as diffusers takes them (``num_blocks_per_group``, ``use_stream``, ``non_blocking`` ...).

        Raises:
            PpclError: offloading by leaves, or the model is offloaded already.
        """
        if self._offload is not None:
            raise PpclError("the model is offloaded already; load it again to offload it in another way")
        how = offload(onload_device, offload_device, offload_type, options)
        self.to(how.offload_device)
        announce(self, how)
        self._offload = how
        self.weights_changed()

    def require_not_offloaded(self) -> None:
        """Raise `PpclError` where the weights are in the hands of diffusers' hooks: nobody else may move them."""
        if self._offload is not None:
            raise PpclError("the model is offloaded by blocks, so it is not moved; load it again to move it")

    def _runner(self, gm: GraphModule) -> GraphModule | Pieces:
        """Return what runs a graph: itself, or its pieces with offloading hooks."""
        if self._offload is None:
            return gm
        # One for each kind of call, as long as its graph is there.
        kept: WeakKeyDictionary[GraphModule, Pieces] = self.__dict__.setdefault("_pieces", WeakKeyDictionary())
        if gm not in kept:
            from diffusers.hooks import apply_group_offloading

            how, pieces = self._offload, Pieces(gm)
            where = {"onload_device": how.onload_device, "offload_device": how.offload_device}
            apply_group_offloading(pieces, **where, offload_type="block_level", **how.options)
            kept[gm] = pieces
        return kept[gm]

    def weights_changed(self) -> None:
        """Forget views of the weights."""
        raise NotImplementedError
