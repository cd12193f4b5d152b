"""Fine-tuning on several ranks: teacher and student sharded block by block with PyTorch's FSDP2, the batch split.

The ranks' gradients add up to those of the whole batch: what comes out is as on one process, but for the order of sums.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.ir.partition import regions
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.passes.edits.outline import outline
from ppcl_fx.train.core.batches import moved
from ppcl_fx.train.core.distiller import Groups, casting, inputs
from ppcl_fx.train.core.losses import output_loss
from ppcl_fx.train.core.stages import WHOLE, Compute, FineTuning, prediction
from ppcl_fx.train.distributed.batch_split import SplitBatch
from ppcl_fx.train.distributed.process_group import ProcessGroup, collective


class FSDPFineTuning(FineTuning):
    """Stage "finetune" on several ranks: `step` takes this rank's `SplitBatch` of a batch.

    Each rank keeps its part of every parameter of teacher and student, of the gradients and of the optimiser's state;
    a block is whole on a rank only while it computes. The pluggable model itself is left as it is, on its own device.
    """

    def __init__(self, model: PluggableModel, students: Sequence[str], ranks: ProcessGroup, compute: Compute) -> None:
        self._ranks, self._compute = ranks, compute
        self._model, self._students = model, list(students)
        self._teacher = sharded(mixture(model, ()), ranks, Compute(), trains=False)
        self.student = sharded(mixture(model, students), ranks, self._compute, trains=True)
        self._device = ranks.device or model.device
        self.groups: Groups = {WHOLE: list(self.student.parameters())}

    def losses(self, kwargs: Mapping[str, Any], target: Tensor | None, scale: float | None) -> dict[str, Tensor]:
        """See `Stage`. Raises PpclError where a rank is lost."""
        with collective():
            mine = super().losses(kwargs, target, scale)
        return {WHOLE: self._ranks.sum(mine[WHOLE])}

    def target(self, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's output for this rank's share of a batch."""
        return super().target(moved(kwargs, self._device))

    def _teacher_for(self, kwargs: Mapping[str, Any]) -> GraphModule:
        """Return the teacher, whose parameters are cut for one graph; PpclError for a call of another kind."""
        if self._model.graph_for(kwargs) is not self._model.graph:
            raise PpclError(
                "the calls are of several kinds, and on several processes a fine-tuning takes those of one; fine-tune "
                "on one process, or on calls recorded with a batch size of 1"
            )
        return self._teacher

    def _loss(self, kwargs: Mapping[str, Any], target: Tensor | None) -> Tensor:
        """The share's part of the loss: the mean over the batch is the sum of the shares' means by their samples."""
        if not isinstance(kwargs, SplitBatch):
            raise RuntimeError("several ranks need a share of the batch each")
        given = moved(kwargs, self._device)
        self._teacher_for(given)
        wanted = super().target(given) if target is None else target.to(self._device)
        with casting(self._device, self._compute.autocast):
            velocity = prediction(self.student(*inputs(self.student, given)))
        return output_loss(velocity, wanted) * (kwargs.samples / kwargs.total)

    def result(self) -> GraphModule | None:
        """Return the fine-tuned model, whole, on rank 0 and the model's own device, and None on the others."""
        whole = copy.deepcopy(mixture(self._model, self._students)) if self._ranks.first else None
        with collective(), torch.no_grad():
            for name, parameter in self.student.named_parameters():
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if whole is not None:
                    whole.get_parameter(name).copy_(value)
        return whole.requires_grad_(False) if whole is not None else None


def sharded(gm: GraphModule, ranks: ProcessGroup, compute: Compute, *, trains: bool) -> GraphModule:
    """Return a graph module like `gm` whose parameters are sharded over all ranks, block by block.

    The modules are new, `gm` and its parameters stay as they are; names are the same. Each outlined block is one unit
    of FSDP2, checkpointed and compiled as `compute` says, and what lies outside of the blocks is another. A block that
    cannot be outlined, since a projector stands between its nodes, is one unit of the modules in it.
    """
    # Parameters of its own over the same storage: sharding replaces them.
    mine = copy.deepcopy(gm, {id(p): Parameter(p.detach(), requires_grad=trains) for p in gm.parameters()})
    units: list[list[nn.Module]] = [*_units(mine, compute), [mine]]
    dtype = next(mine.parameters()).dtype
    # Gradients in 16 bits are added up in 32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype in (torch.bfloat16, torch.float16) else None)
    mesh = init_device_mesh(ranks.device.type if ranks.device is not None else "cpu", (ranks.world,))
    for unit in units:
        if trains and not compute.backend:
            for module in unit:
                module.forward = functools.partial(_without_views, module.forward)
        # The outermost unit is cut again too: a forward pass without a backward one would leave it whole, and what is
        # written into its parts afterwards would not be seen.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in mine.modules():
        if isinstance(module, FSDPModule):
            # The shares' weights add up to 1 already, and gloo knows no other reduction than the sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return mine


def _units(gm: GraphModule, compute: Compute) -> list[list[nn.Module]]:
    """Outline the blocks of `gm`, in place, and return the modules that are sharded together."""
    units: list[list[nn.Module]] = []
    for path, nodes in regions(gm).items():
        leaves = list(dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"))
        try:
            outline(gm, path, nodes)
        except Refusal:
            units.append([gm.get_submodule(leaf) for leaf in leaves])
            continue
        block = gm.get_submodule(path)
        if compute.checkpointing:
            # Inside of FSDP's hooks: the block is gathered once for the backward pass and what it computes again.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compute.backend:
            block.compile(backend=compute.backend)
        units.append([block])
    gm.recompile()
    kept = [[module for module in unit if any(True for _ in module.parameters())] for unit in units]
    return [unit for unit in kept if unit]


def _without_views(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a unit and give its outputs memory of their own, where gradients are on.

    FSDP2 hangs its hook for the backward pass on them, and a later operation in place on a view would drop it.
    """
    outputs = forward(*args, **kwargs)
    if not torch.is_grad_enabled():
        return outputs
    return tree_map_only(Tensor, lambda t: t.clone() if t._is_view() else t, outputs)
