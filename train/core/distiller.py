"""Runs the distillation graph: the teacher without gradients, each edit's loss backpropagated at its own node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint

from ppcl_fx.ir.graphs import ancestors, descendants
from ppcl_fx.tracing import bind
from ppcl_fx.train.config import Weights
from ppcl_fx.train.core.distillation_graph import TRAINED, loss_nodes, pairs
from ppcl_fx.train.core.losses import edit_loss, total_loss

Groups = dict[str, list[Parameter]]
"""Edit id -> the parameters that train for it."""


def in_one_piece(module: Module) -> bool:
    """Tell whether a module is one of `torch.nn` itself: a linear layer keeps nothing but its input anyway."""
    return type(module).__module__.startswith("torch.nn.")


class Saving(Interpreter):
    """Interpreter that, `checkpointing`, keeps only the inputs of modules, and computes their insides again in the
    backward pass; but for those of `torch.nn` itself.
    """

    def __init__(self, gm: GraphModule, *, checkpointing: bool) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # it would make several lines of an error's one
        self._checkpointing = checkpointing

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module node, checkpointed where that was asked for and gradients are on."""
        if self._checkpointing and torch.is_grad_enabled():
            module = self.fetch_attr(target)
            if not in_one_piece(module):
                return checkpoint(module, *args, use_reentrant=False, **kwargs)
        return super().call_module(target, args, kwargs)


class Distiller(Saving):
    """Interpreter of a distillation graph (`ppcl_fx.train.core.distillation_graph.distil`).

    A node runs with gradients only where a training parameter comes before it, so the teacher leaves nothing behind
    for a backward pass. At a `pairs` node the edit's loss is known: it is backpropagated there and then, and the
    interpreter frees the edit's values with their last use. So no more than one student's activations are alive at
    any time. The parameters that train have `requires_grad`, all others have not.

    With `joint` the losses are summed and backpropagated once at the end: for sequential distillation, where an edit's
    student feeds the next edit's, and errors and gradients run through the chain. `autocast` is the dtype to compute
    matrix products in, or None for the tensors' own. Raises RuntimeError as `edit_parameters` does.
    """

    def __init__(
        self,
        gm: GraphModule,
        weights: Weights | None = None,
        *,
        joint: bool = False,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(gm, checkpointing=checkpointing)
        self.gm, self._weights, self._joint, self._autocast = gm, weights or Weights(), joint, autocast
        self._trained = live_nodes(gm)
        self._live: set[Node] = set()
        self._scale = 1.0
        self._losses: dict[str, Tensor] = {}
        self.groups = edit_parameters(gm)

    def step(self, batch: Mapping[str, Any] | Sequence[Any], scale: float | None = 1.0) -> dict[str, Tensor]:
        """Run the graph on a call's arguments, or on its placeholders' values in order, and add each edit's gradients,
        times `scale`, to its parameters' `.grad`; None for no gradients. Return each edit's loss, a detached float32
        scalar, not scaled.
        """
        values = inputs(self.gm, batch) if isinstance(batch, Mapping) else batch
        self._live, self._scale, self._losses = set() if scale is None else self._trained, scale or 0.0, {}
        mode = torch.set_grad_enabled(torch.is_grad_enabled())  # puts it back at the end
        with mode, casting(_device(self.gm), self._autocast):
            self.run(*values)
        losses, self._losses = self._losses, {}
        if self._joint and scale is not None:
            torch.autograd.backward(total_loss(losses.values()) * scale)
        return {edit: loss.detach() for edit, loss in losses.items()}

    def run_node(self, n: Node) -> Any:
        """Run one node, with gradients only where they are needed."""
        if torch.is_grad_enabled() != (n in self._live):
            torch.set_grad_enabled(n in self._live)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function node; a `pairs` node becomes its edit's loss."""
        if target is pairs:
            return self._align(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def _align(self, edit_id: str, terms: tuple[tuple[str, Tensor, Tensor], ...]) -> Tensor:
        with torch.autocast(_device(self.gm).type, enabled=False):
            loss = edit_loss(terms, self._weights)
            if edit_id in self._losses:
                raise RuntimeError(f"edit {edit_id} ends in two `pairs` nodes")
            if not self._joint and loss.requires_grad:
                torch.autograd.backward(loss * self._scale)
                loss = loss.detach()
        self._losses[edit_id] = loss
        return loss.detach()


def without_edit(gm: GraphModule, edit: str) -> None:
    """Take an edit's loss out of a distillation graph, in place, and everything that only it needed.

    Its student stays where other losses are computed from it (in a sequential graph), and so do the graph's
    inputs and guards: a call that was refused before is refused afterwards.
    """
    before = ancestors([end for end in loss_nodes(gm) if end.args[0] == edit])
    kept = ancestors([n for n in gm.graph.nodes if n not in before])
    for node in reversed(list(gm.graph.nodes)):
        if node in before and node not in kept and node.op != "placeholder":
            gm.graph.erase_node(node)
    gm.recompile()


def live_nodes(gm: GraphModule) -> set[Node]:
    """Return the nodes that a training parameter comes before (or in): the ones to run with gradients."""
    return descendants(node for node in gm.graph.nodes if node_parameters(gm, node))


def node_parameters(gm: GraphModule, node: Node) -> list[Parameter]:
    """Return the training parameters that `node` itself reads."""
    if node.op == "call_module":
        return [p for p in gm.get_submodule(str(node.target)).parameters() if p.requires_grad]
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(gm.get_submodule(owner), name)
        return [value] if isinstance(value, Parameter) and value.requires_grad else []
    return []


def edit_parameters(gm: GraphModule) -> Groups:
    """Return each edit's training parameters, edits in the order of their `pairs` nodes.

    A parameter belongs to the edit that it was made for; in a sequential graph it leads to others' losses as well.
    Where the graph does not say which that is, it is the first edit that it leads to. Raises RuntimeError for
    a `pairs` node without training parameters, and for training parameters without one: the graph is not one of ours.
    """
    groups: Groups = {}
    owned: set[int] = set()
    for end in loss_nodes(gm):
        before, path = ancestors([end]), end.meta.get(TRAINED)
        mine = [node for node in gm.graph.nodes if node in before]
        if path is not None:
            mine = [node for node in mine if f"{node.target}.".startswith(f"{path}.")]
        found = {id(p): p for node in mine for p in node_parameters(gm, node) if id(p) not in owned}
        owned |= found.keys()
        groups[str(end.args[0])] = list(found.values())
    stray = [name for name, p in gm.named_parameters() if p.requires_grad and id(p) not in owned]
    if stray:
        raise RuntimeError(f"parameters that train for no edit: {', '.join(stray[:5])}")
    empty = [edit for edit, parameters in groups.items() if not parameters]
    if empty:
        raise RuntimeError(f"edits with nothing to train: {', '.join(empty)}")
    return groups


def inputs(gm: GraphModule, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return a call's arguments in the order of the graph's placeholders. Raises GuardError where the call lies
    outside of what was traced.
    """
    bound = bind(gm, kwargs)
    return [bound[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"]


def casting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the context in which to compute: autocast to `dtype`, or nothing for None.

    The cache of cast weights is off: it would hold every student's weights to the end of the step, and what
    it caches without gradients it would hand out where gradients are needed.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def _device(gm: GraphModule) -> torch.device:
    return next(gm.parameters()).device
