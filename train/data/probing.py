"""Looking into a run of a pipeline: the noise it draws, its scheduler's shift, a transformer that stands still."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppcl_fx.calls.store import map_tensors


class Noise(TorchFunctionMode):
    """Notes what `torch.randn` gives, and puts a known tensor in the place of the noise of its shape.

    A pipeline of rectified flow begins with noise at sigma 1. With a clean latent in the noise's place, the first call
    of its transformer holds that latent as the pipeline itself lays it out.

    Args:
        known: What to give instead; sizes of 1 in its shape do not count. None: the noise itself.

    Attributes:
        drawn: What was given, in order.
        used: How often `known` was given.
    """

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known = known
        self.drawn: list[Tensor] = []
        self.used = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and see to its result where it is `torch.randn`."""
        result = func(*args, **(kwargs or {}))
        if func is torch.randn:
            if self.known is not None and plain_shape(result) == plain_shape(self.known):
                result = self.known.reshape(result.shape).to(result)
                self.used += 1
            self.drawn.append(result)
        return result


def plain_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape without the sizes of 1."""
    return tuple(size for size in tensor.shape if size != 1)


@contextmanager
def noted_mu(scheduler: Any) -> Iterator[list[float | None]]:
    """Yield a list that gets the `mu` of each time the pipeline sets the scheduler's timesteps."""
    seen: list[float | None] = []
    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at the signature
    def noting(*args: Any, **kwargs: Any) -> Any:
        mu = kwargs.get("mu")
        seen.append(None if mu is None else float(mu))
        return original(*args, **kwargs)

    scheduler.set_timesteps = noting
    try:
        yield seen
    finally:
        del scheduler.set_timesteps


@contextmanager
def standing_still(transformer: nn.Module) -> Iterator[None]:
    """Let the transformer answer zero velocity, in the form of its own answers."""

    def still(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, dict):  # a diffusers output, which is set by key
            for key in list(output):
                output[key] = map_tensors(output[key], _zeros)
            return output
        return map_tensors(output, _zeros)

    handle = transformer.register_forward_hook(still)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def noted_decoding(vae: Any) -> Iterator[list[Tensor]]:
    """Yield a list that gets what the VAE is asked to decode."""
    seen: list[Tensor] = []
    if vae is None:
        yield seen
        return
    original = vae.decode

    @functools.wraps(original)
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach())
        return original(*args, **kwargs)

    vae.decode = noting
    try:
        yield seen
    finally:
        del vae.decode


def _zeros(_: str, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)
