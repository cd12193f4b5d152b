"""Float32 masters of weights that are stored in 16 bits, where a small update would be rounded away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ppcl_fx.train.executor import Groups

_LOW = (torch.bfloat16, torch.float16)


def is_low(parameter: Tensor) -> bool:
    """Tell whether a parameter is stored in 16 bits, so that it gets a master."""
    return parameter.dtype in _LOW


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
        """Add the gradients of the 16-bit parameters to those of their masters, in float32, and drop them."""
        for parameter, master in self._copies:
            if parameter.grad is not None:
                fresh = parameter.grad.float()
                master.grad = fresh if master.grad is None else master.grad + fresh
            parameter.grad = None

    def write_back(self) -> None:
        """Round the masters into the model."""
        with torch.no_grad():
            for parameter, master in self._copies:
                parameter.copy_(master)

    def read_back(self, parameters: Sequence[Parameter]) -> None:
        """Set the masters of some of the model's parameters to what these are now."""
        wanted = {id(parameter) for parameter in parameters}
        with torch.no_grad():
            for parameter, master in self._copies:
                if id(parameter) in wanted:
                    master.copy_(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the masters."""
        return {f"master.{number}": master for number, (_, master) in enumerate(self._copies)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `tensors` returned; other names are left alone."""
        with torch.no_grad():
            for number, (_, master) in enumerate(self._copies):
                master.copy_(tensors[f"master.{number}"])

    def _master(self, parameter: Parameter) -> Parameter:
        if not is_low(parameter):
            return parameter
        master = Parameter(parameter.detach().float())
        self._copies.append((parameter, master))
        return master
