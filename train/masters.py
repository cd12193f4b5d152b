"""Float32 masters of weights that are stored in 16 bits, where a small update would be rounded away."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.train.executor import Groups

_LOW = (torch.bfloat16, torch.float16)


class Masters:
    """What the optimiser updates: a float32 copy of each 16-bit parameter, and every other parameter itself.

    The model keeps its own dtype, which its graph was traced with.

    Args:
        groups: Edit id -> the model's parameters.

    Attributes:
        groups: Edit id -> the parameters for the optimiser.
    """

    def __init__(self, groups: Groups) -> None:
        self._copies: list[tuple[Parameter, Parameter]] = []
        self.groups: Groups = {
            edit: [self._master(parameter) for parameter in parameters] for edit, parameters in groups.items()
        }

    def take_gradients(self) -> None:
        """Move the gradients of the 16-bit parameters to their masters; what these have already is added to."""
        for parameter, master in self._copies:
            if parameter.grad is not None:
                master.grad = (
                    parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                )
            parameter.grad = None

    def write_back(self) -> None:
        """Round the masters into the model."""
        with torch.no_grad():
            for parameter, master in self._copies:
                parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the masters."""
        return {f"master.{number}": master for number, (_, master) in enumerate(self._copies)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `tensors` returned; other names are left alone."""
        with torch.no_grad():
            for number, (_, master) in enumerate(self._copies):
                master.copy_(tensors[f"master.{number}"])

    def _master(self, parameter: Parameter) -> Parameter:
        if parameter.dtype not in _LOW:
            return parameter
        master = Parameter(parameter.detach().float())
        self._copies.append((parameter, master))
        return master
