"""Linear layers over quantised weights, for graphs that run in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.ir.graphs import copy_modules
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is stored in few bits and dequantised whenever it runs.

    It takes ``[..., columns]`` and gives ``[..., rows]``. Its memory is that of the packed weight and the scales.

    Args:
        scheme: how the weight is stored.
        packed: the weight, as `QuantisedWeight.packed` gives it.
        scales: ``[rows, columns / block]``; the layer computes in their dtype.
        bias: ``[rows]``, or None.
        inputs: for FP8 the scale of the inputs.

    Raises:
        PpclError: values and scales do not fit each other.
    """

    packed: Tensor

    def __init__(
        self, scheme: Scheme, packed: Tensor, scales: Tensor, bias: Tensor | None = None, inputs: float | None = None
    ) -> None:
        super().__init__()
        rows = QuantisedWeight.unpacked(scheme, packed, scales).values.shape
        self.out_features, self.in_features = rows
        self.scheme, self.inputs = scheme, inputs
        # FP8 as bytes: a model that is widened keeps them.
        self.register_buffer("packed", packed.view(torch.uint8) if packed.is_floating_point() else packed)
        self.scales = nn.Parameter(scales, requires_grad=False)  # widened with the model
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, weight: QuantisedWeight, bias: Tensor | None = None) -> QuantisedLinear:
        """Return the layer of a weight."""
        return cls(weight.scheme, weight.packed(), weight.scales.to(weight.scheme.scale), bias, weight.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Dequantise, and multiply."""
        weight = QuantisedWeight.unpacked(self.scheme, self.packed, self.scales).dequantised(self.scales.dtype)
        return nn.functional.linear(self.scheme.stored_inputs(x, self.inputs), weight, self.bias)

    def extra_repr(self) -> str:
        """Say what it is, as `torch.nn.Linear` does."""
        return f"{self.in_features}, {self.out_features}, {self.scheme.weights}, block={self.scheme.block}"


def with_quantised(gm: GraphModule, weights: Mapping[str, QuantisedWeight]) -> GraphModule:
    """Return a graph over the same tensors whose linear layers, by module path, are those of quantised weights."""
    made = copy_modules(gm)
    for path, weight in weights.items():
        layer = gm.get_submodule(path)
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        made.set_submodule(path, QuantisedLinear.of(weight, bias).train(layer.training))
    return made
