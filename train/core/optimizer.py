"""The optimiser and what stands around it: AdamW, its learning rate, clipping, float32 master weights, EMA."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppcl_fx.errors import PpclError
from ppcl_fx.train.core.distiller import Groups

EIGHT_BIT = "bitsandbytes"
"""The package of the 8-bit AdamW."""
EIGHT_BIT_FROM = 4096
"""Values from which on a parameter's averages take a byte each; those of smaller ones stay float32."""


def warmup_steps(total: int) -> int:
    """Return the length of the warm-up of a run of `total` steps: a twentieth, at least 1 and at most 100."""
    return min(100, max(1, total // 20))


def factor(step: int, total: int, warmup: int | None = None) -> float:
    """Return the share of the peak learning rate at `step` (from 0) of `total`: linear up over `warmup` steps
    (None: `warmup_steps`), then half a cosine to 0. A resumed run needs no state of a scheduler.
    """
    warmup = warmup_steps(total) if warmup is None else min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup + 1) / max(1, total - warmup + 1)))


def make_optimizer(
    groups: Mapping[str, Sequence[Parameter]],
    lr: float,
    kind: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.02,
) -> torch.optim.Optimizer:
    """Return AdamW, as in the paper's Sec. 4.1, over `groups` (edit id -> its parameters), one parameter group an edit.

    With the `kind` "adamw8bit" its two averages take a byte each for every parameter. Raises PpclError where that is
    asked for and bitsandbytes is not installed.
    """
    named = [{"params": list(parameters), "name": name} for name, parameters in groups.items()]
    if kind == "adamw8bit":
        made: torch.optim.Optimizer = eight_bit().optim.AdamW8bit(named, lr=lr, betas=betas, weight_decay=weight_decay)
        return made
    fused = all(p.device.type in {"cpu", "cuda"} for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(named, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def eight_bit() -> Any:
    """Return the package bitsandbytes. Raises PpclError where it is not installed."""
    try:
        return importlib.import_module(EIGHT_BIT)
    except ImportError as error:
        raise PpclError(
            f"training option optimizer: adamw8bit needs {EIGHT_BIT}, which is not here ({error}); "
            "pip install 'ppcl-fx[bnb]', or take adamw"
        ) from None


def try_eight_bit(device: torch.device) -> None:
    """Do one step of the 8-bit AdamW on `device`: it imports where its compiled half is missing, and fails at a step.
    Raises PpclError where bitsandbytes is not installed, or cannot do a step on this device.
    """
    package = eight_bit()
    parameter = Parameter(torch.zeros(EIGHT_BIT_FROM, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        package.optim.AdamW8bit([parameter]).step()
        if float(parameter.detach().abs().max()) == 0.0:
            raise RuntimeError("a step changes nothing")
    except Exception as error:  # noqa: BLE001 - whatever it is, the person hears it before the training
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PpclError(
            f"training option optimizer: adamw8bit does not run on {device.type} with {EIGHT_BIT} "
            f"{package.__version__} ({reason}); take adamw"
        ) from None


def clip(groups: Mapping[str, Sequence[Parameter]], limit: float | None) -> dict[str, Tensor]:
    """Scale each edit's gradients so that their joint L2 norm is at most `limit` (None: leave them).

    Each edit has a norm of its own: a bad batch for one interval must not slow the others, which Eq. 6 keeps apart.
    Returned is the norm before scaling, a scalar on the parameters' device.
    """
    norms: dict[str, Tensor] = {}
    for name, parameters in groups.items():
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Of sharded gradients each rank knows its own part of the norm.
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if limit is not None:
            clip_grads_with_norm_(parameters, limit, norms[name])
    return norms


def is_low(parameter: Tensor) -> bool:
    """Tell whether a parameter is stored in 16 bits, so that it gets a float32 master."""
    return parameter.dtype in (torch.bfloat16, torch.float16)


class MasterWeights:
    """What the optimiser updates: a float32 copy of each 16-bit parameter, and every other parameter itself.

    In 16 bits a small update would be rounded away. The model keeps its own dtype, which its graph was traced with.

    Attributes:
        groups: Edit id -> the parameters for the optimiser.
    """

    def __init__(self, groups: Groups) -> None:
        self._copies: list[tuple[Parameter, Parameter]] = []
        self.groups: Groups = {edit: [self._master(p) for p in parameters] for edit, parameters in groups.items()}

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

    def _master(self, parameter: Parameter) -> Parameter:
        if not is_low(parameter):
            return parameter
        master = Parameter(parameter.detach().float())
        self._copies.append((parameter, master))
        return master


class EMA:
    """Exponential moving averages (EMA) of what the optimiser updates, in float32, edit by edit: the result.

    Of an average the share `decay` stays at each step; None for no averages.
    """

    def __init__(self, masters: MasterWeights, decay: float | None) -> None:
        self._masters, self._decay = masters, decay or 0.0
        self._numbers = {edit: number for number, edit in enumerate(masters.groups)}
        followed: Groups = {} if decay is None else masters.groups
        self._values = {
            edit: [p.detach().to(torch.float32, copy=True) for p in parameters] for edit, parameters in followed.items()
        }

    def update(self, step: int) -> None:
        """Move towards the weights after update number `step` (from 0); faster at first, or it would stay there."""
        share = 1.0 - min(self._decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for edit, values in self._values.items():
                for value, parameter in zip(values, self._masters.groups[edit], strict=True):
                    value.lerp_(parameter.float(), share)

    def settle(self, edit: str) -> None:
        """Make an edit's average its weights, and follow it no further."""
        self._put(edit, self._values.pop(edit, []))

    def forget(self, edit: str) -> None:
        """Follow an edit no further and leave its weights as they are."""
        self._values.pop(edit, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the averages as its weights for a while."""
        kept = {edit: [p.detach().clone() for p in self._masters.groups[edit]] for edit in self._values}
        try:
            for edit, values in self._values.items():
                self._put(edit, values)
            yield
        finally:
            for edit, values in kept.items():
                self._put(edit, values)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of the averages."""
        return {
            f"average.{self._numbers[edit]}.{i}": value
            for edit, values in self._values.items()
            for i, value in enumerate(values)
        }

    def _put(self, edit: str, values: list[Tensor]) -> None:
        if not values:
            return
        with torch.no_grad():
            for parameter, value in zip(self._masters.groups[edit], values, strict=True):
                parameter.copy_(value)
        self._masters.write_back()
