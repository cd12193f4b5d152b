"""What a pipeline's calls look like: which argument is the noisy latent, which the time, and what the rest does.

Found by running the pipeline. What is no rectified flow on latents that are only laid out anew is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppcl_fx.calls.record import TIMES, first_call, record
from ppcl_fx.calls.store import Call, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import Record
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.train.images.flow import Shift, noised, shifted

STEPS = 3  # denoising steps of the run that shows how the time is passed


class Unsupported(PpclError):
    """A pipeline that pictures cannot be prepared for; recorded calls and prompts still work."""

    def __init__(self, pipeline: Any, why: str) -> None:
        super().__init__(f"{type(pipeline).__name__}: {why}; use --prompts or --calls with this pipeline")


class Template(Record):
    """How to make a call of the transformer from a clean latent and a noise level."""

    version: Literal[1] = 1
    noisy: tuple[str, ...]  # paths of the tensors that are the noisy latent, such as "hidden_states" or "x.0"
    repeats: int  # how often it is in each of them, along its rows: 2 where both branches of guidance are
    time: str  # the argument that is the time
    scale: float  # the time at sigma 1, or at sigma 0 where it is inverted
    inverted: bool
    shift: Shift
    amount: float  # the static shift; unused with the others, whose `mu` belongs to each sample
    noise: tuple[int, ...]  # shape of the noise that the pipeline drew in the run that was looked at

    def sigma(self, u: float, mu: float | None) -> float:
        """Return the noise level u after the scheduler's shift; `mu` is the sample's."""
        return shifted(u, self.shift, self.amount if mu is None else mu)

    def at(self, kwargs: dict[str, Any], sigma: float, generator: torch.Generator) -> dict[str, Any]:
        """Return a call's arguments at noise level `sigma`, in (0, 1), from those with the clean latent in its place.

        Rows that hold the same picture (guidance) get the same noise.
        """
        state = generator.get_state()

        def change(path: str, tensor: Tensor) -> Tensor:
            if path in self.noisy:
                generator.set_state(state)
                shape = (tensor.shape[0] // self.repeats, *tensor.shape[1:])
                noise = torch.randn(shape, generator=generator)
                return noised(tensor, torch.cat([noise] * self.repeats), sigma)
            return torch.full_like(tensor, self._time(sigma)) if path == self.time else tensor

        changed = {name: map_tensors(value, change, name) for name, value in kwargs.items()}
        if isinstance(changed[self.time], float):
            changed[self.time] = self._time(sigma)
        return changed

    def _time(self, sigma: float) -> float:
        return self.scale * (1 - sigma if self.inverted else sigma)


def find_template(pipeline: Any, caption: str, given: Mapping[str, Any] | None = None) -> Template:
    """Run a pipeline for a few steps, its transformer answering zero, and find out how that is called.

    `given` are further arguments of the pipeline, such as height and width. Raises Unsupported where it is no
    rectified flow, or does more to its latents than lay them out.
    """
    given = given or {}
    noisy, noise = _noisy(pipeline, caption, given)
    with standing_still(pipeline.transformer):
        calls = record(pipeline, [caption], batch_size=1, num_inference_steps=STEPS, **given)
    time = next(name for name in TIMES if name in calls[0].kwargs)
    value = calls[0].kwargs[time]
    if not isinstance(value, float) and not (isinstance(value, Tensor) and value.is_floating_point()):
        raise Unsupported(pipeline, f"its time {time!r} is no floating-point number")
    _check_steady(pipeline, calls, {*noisy, time})
    scale, inverted = _scale(pipeline, calls, value)
    shift, amount = _shift(pipeline)
    repeats = tensors_of(calls[0].kwargs)[noisy[0]].numel() // noise.numel()
    return Template(
        noisy=noisy, repeats=repeats, time=time, scale=scale, inverted=inverted, shift=shift, amount=amount,
        noise=tuple(noise.shape),
    )  # fmt: skip


def is_laid_out(tensor: Tensor, clean: Tensor, times: int) -> bool:
    """Tell whether `tensor` holds the values of `clean` in another order, `times` times along its rows."""
    if not tensor.ndim or tensor.shape[0] % times or tensor.numel() != times * clean.numel():
        return False
    parts = tensor.chunk(times)
    sorted_clean = clean.to(tensor).flatten().sort().values
    alike = all(torch.equal(part, parts[0]) for part in parts)
    return alike and torch.equal(parts[0].flatten().sort().values, sorted_clean)


def tensors_of(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a call's arguments by their paths."""
    found: dict[str, Tensor] = {}
    for name, value in kwargs.items():
        map_tensors(value, found.__setitem__, name)
    return found


def _noisy(pipeline: Any, caption: str, given: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor]:
    """The arguments that follow the noise and nothing else, and the noise."""
    seen = []
    for seed in (0, 1):
        with Noise() as noise:
            call = first_call(pipeline, caption, seed=seed, **given)
        seen.append((tensors_of(call.kwargs), noise.drawn))
    (first, drawn), (second, _) = seen
    changed = tuple(path for path in first if not torch.equal(first[path], second.get(path, first[path])))
    if not changed:
        raise Unsupported(pipeline, "no argument of its transformer follows the noise")
    for tensor in drawn:
        times = first[changed[0]].numel() // max(1, tensor.numel())
        if times and all(is_laid_out(first[path], tensor, times) for path in changed):
            return changed, tensor
    names = ", ".join(changed)
    raise Unsupported(pipeline, f"its noise does not come as it was drawn into {names}")


def _check_steady(pipeline: Any, calls: Sequence[Call], moving: set[str]) -> None:
    """All but the noisy latent and the time must be the same at each step: it is encoded once."""

    def still(call: Call) -> dict[str, Any]:
        def digest(path: str, tensor: Tensor) -> str:
            return "" if path in moving else tensor_digest(tensor)

        return {name: map_tensors(v, digest, name) for name, v in call.kwargs.items() if name not in moving}

    first = {call.branch: still(call) for call in reversed(calls)}
    for call in calls:
        for name, value in still(call).items():
            if first[call.branch].get(name) != value:
                raise Unsupported(pipeline, f"the argument {name!r} of its transformer changes from step to step")


def _scale(pipeline: Any, calls: Sequence[Call], value: Any) -> tuple[float, bool]:
    """How the time follows from sigma, as the scheduler's own levels and the recorded times tell."""
    sigmas = getattr(pipeline.scheduler, "sigmas", None)
    times = [call.timestep for call in calls if call.branch == 0]
    if not isinstance(sigmas, Tensor) or len(sigmas) != len(times) + 1 or float(sigmas.min()) < 0:
        raise Unsupported(pipeline, "its scheduler has no noise level (sigma) for each step")
    if float(sigmas[0]) > 1.001 or pipeline.scheduler.config.get("invert_sigmas"):
        raise Unsupported(pipeline, "its scheduler's noise levels do not run from 1 to 0, so it is no rectified flow")
    eps = torch.finfo(value.dtype).eps if isinstance(value, Tensor) else 0.0
    for scale in (1.0, float(pipeline.scheduler.config.get("num_train_timesteps", 1000))):
        for inverted in (False, True):
            expected = [scale * (1 - s if inverted else s) for s in sigmas[:-1].tolist()]
            near = scale * max(1e-4, 2 * eps)
            if all(abs(t - e) <= near for t, e in zip(times, expected, strict=True)):
                return scale, inverted
    raise Unsupported(pipeline, f"its times {times} do not follow from the noise levels {sigmas[:-1].tolist()}")


def _shift(pipeline: Any) -> tuple[Shift, float]:
    scheduler = pipeline.scheduler
    if scheduler.config.get("use_dynamic_shifting"):
        kind = scheduler.config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise Unsupported(pipeline, f"its scheduler shifts noise levels by {kind!r}")
        return kind, 0.0
    amount = getattr(scheduler, "shift", None)
    if not isinstance(amount, int | float):
        raise Unsupported(pipeline, "its scheduler has no shift of noise levels")
    return "static", float(amount)


class Noise(TorchFunctionMode):
    """Notes in `drawn` what `torch.randn` gives, and puts a known tensor in the place of the noise of its shape.

    A pipeline of rectified flow begins with noise at sigma 1. With a clean latent in the noise's place, the first call
    of its transformer holds that latent as the pipeline itself lays it out. Sizes of 1 do not count in the shape of
    `known`, and `used` says how often it was given.
    """

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known, self.used = known, 0
        self.drawn: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
def noted(owner: Any, method: str) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Yield a list that gets the arguments of each call of a method; of an owner that is None, none."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if owner is None:
        yield seen
        return
    original = getattr(owner, method)

    @functools.wraps(original)  # pipelines look at the signature
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, method, noting)
    try:
        yield seen
    finally:
        delattr(owner, method)


@contextmanager
def standing_still(transformer: nn.Module) -> Iterator[None]:
    """Let the transformer answer zero velocity, in the form of its own answers."""

    def zeros(_: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    def still(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, dict):
            return map_tensors(output, zeros)
        for key in list(output):  # a diffusers output, which is set by key
            output[key] = map_tensors(output[key], zeros)
        return output

    handle = transformer.register_forward_hook(still)
    try:
        yield
    finally:
        handle.remove()
