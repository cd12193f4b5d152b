"""Record: run a diffusers pipeline and keep what its transformer is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ppcl_fx.calls.kinds import ones_in
from ppcl_fx.calls.pipeline_arguments import PipelineArguments, run_arguments, with_steps
from ppcl_fx.calls.store import Call, Calls, check_finite, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint, tensor_digest

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""
OUTPUT_BYTES = 2**30
"""Outputs are recorded, unless asked for, up to this many bytes in all."""
TIMES = ("timestep", "timesteps", "t", "sigma")
"""The names under which diffusers' transformers take the time."""


def record(
    pipeline: Any,
    prompts: str | Sequence[str],
    *,
    batch_size: int = 8,
    num_inference_steps: int | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    outputs: bool | None = None,
    per_prompt: Sequence[str] = (),
    **pipeline_kwargs: Any,
) -> Calls:
    """Draw `prompts` with a diffusers pipeline and return every call of its transformer.

    Each branch of classifier-free guidance that the pipeline runs on its own is a call of its own. Arguments that are
    None are left out, tensors are copied to the CPU, equal ones once, and the pipeline is left as it was.

    Args:
        pipeline: any diffusers pipeline with a `transformer`.
        prompts: what to draw. With `prompt_embeds` among the `pipeline_kwargs` they only label the calls.
        batch_size: prompts in one run of the pipeline.
        num_inference_steps: denoising steps; the pipeline's own default when None.
        seed: prompt number i starts from noise of the seed ``seed + i``, whatever the batch size.
        progress: called with the denoising steps done and the number of all.
        outputs: record what the transformer returned too, which saves fine-tuning a pass of the teacher; None: if
            all of it takes no more than `OUTPUT_BYTES`.
        per_prompt: names of further `pipeline_kwargs` that hold one item a prompt, such as an ``image``.
        **pipeline_kwargs: go to the pipeline, divided among its runs as
            `ppcl_fx.calls.pipeline_arguments.PipelineArguments` says. Where there is a VAE and `output_type` is not
            given, it is "latent": pictures are not decoded.

    Raises:
        PpclError: the pipeline has no transformer or refuses an argument, an argument has another number of items
            than there are prompts, or the transformer gets NaN or an argument that cannot be stored.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise PpclError(f"{type(pipeline).__name__} has no transformer; record needs a pipeline with one (a DiT)")
    given = with_steps(pipeline_kwargs, num_inference_steps)
    arguments = PipelineArguments(pipeline, texts, given, seed, per_prompt)
    runs = arguments.runs(batch_size)
    recorder = _Recorder(pipeline, len(runs), progress, outputs)
    with torch.no_grad(), quiet(pipeline), recorder.hooked():
        for run in runs:
            recorder.begin(tuple(texts[i] for i in run))
            _run(pipeline, recorder, arguments.of(run))
    if progress is not None:
        progress(recorder.total(), recorder.total())
    calls = Calls(recorder.calls, fingerprint(transformer))
    calls.ones = ones_in(calls.examples(), transformer)
    return calls


def first_call(pipeline: Any, prompt: str, *, seed: int = 42, **pipeline_kwargs: Any) -> Call:
    """Return what a pipeline first calls its transformer with, as `record` does; the transformer itself is not run."""
    arguments = run_arguments(pipeline, [prompt], seed=seed, **pipeline_kwargs)
    recorder = _Recorder(pipeline, 1, None, outputs=False, limit=1)
    recorder.begin((prompt,))
    with torch.no_grad(), quiet(pipeline), recorder.hooked(), suppress(_Enough):
        _run(pipeline, recorder, arguments)
    if hasattr(pipeline, "maybe_free_model_hooks"):
        pipeline.maybe_free_model_hooks()  # what the pipeline does at its end
    return recorder.calls[0]


class _Enough(Exception):
    """Ends a run of a pipeline whose later calls are not wanted."""


class _Recorder:
    """The hook on the transformer, and what it has seen; after `limit` calls it ends the run."""

    def __init__(
        self, pipeline: Any, runs: int, progress: Progress | None, outputs: bool | None, limit: int | None = None
    ) -> None:
        transformer: nn.Module = pipeline.transformer
        self.pipeline, self.transformer, self.runs = pipeline, transformer, runs
        self.progress, self.limit = progress, limit
        # A compiled module hides the signature of the one inside.
        self.signature = inspect.signature(getattr(transformer, "_orig_mod", transformer).forward)
        self.calls: list[Call] = []
        self.known: dict[str, torch.Tensor] = {}
        self.run = -1
        self.outputs = outputs is not False
        self.room = OUTPUT_BYTES if outputs is None else None

    def begin(self, prompts: tuple[str, ...]) -> None:
        """Start a run of the pipeline for these prompts."""
        self.prompts, self.seen = prompts, False
        self.run += 1
        self.step = self.branch = 0
        self.time: float | None = None

    def steps(self) -> int:
        """Denoising steps of one run, as its scheduler was set; 1 where there is no telling."""
        timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        return 1 if timesteps is None else max(1, len(timesteps))

    def total(self) -> int:
        """All denoising steps of all runs."""
        return self.runs * self.steps()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to the transformer until the block ends, however it ends."""
        before = self.transformer.register_forward_pre_hook(self._hear, with_kwargs=True)
        with before, self.transformer.register_forward_hook(self._answer):
            yield

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = len(self.calls)
        given = self._named(args, kwargs)
        kept = {name: map_tensors(value, self._keep, name) for name, value in given.items()}
        time = next((given[name] for name in TIMES if name in given), None)
        if time is None:
            raise PpclError(f"{self._class()} was called without a time ({', '.join(TIMES)}); it cannot be recorded")
        time = float(time.flatten()[0] if isinstance(time, torch.Tensor) else time)
        # The first argument is the noisy sample: a batched tensor, or a list with a tensor a picture.
        sample = next((value for value in given.values() if isinstance(value, torch.Tensor | list)), None)
        if sample is None:
            raise PpclError(f"{self._class()} was called without a tensor; it cannot be recorded")
        self.step += time != self.time
        self.branch = 0 if time != self.time else self.branch + 1
        self.time, self.seen = time, True
        if self.progress is not None and self.branch == 0:
            self.progress(self.run * self.steps() + min(self.step - 1, self.steps()), self.total())
        self.calls.append(Call(kept, self.prompts, time, index, len(sample), self.branch))
        if len(self.calls) == self.limit:
            raise _Enough

    def _answer(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Keep the output with its call, or, once all of them are too large, none."""
        first = next(iter(result.values()), None) if isinstance(result, Mapping) else result
        output = first[0] if isinstance(first, tuple | list) and first else first
        if not self.outputs or not isinstance(output, torch.Tensor):
            return
        if self.room is not None:
            self.room -= output.nbytes
            if self.room < 0:
                self.outputs = False
                self.calls = [replace(call, output=None) for call in self.calls]
                return
        copy = self._copy(output)
        check_finite(copy, f"call {len(self.calls) - 1} ({self.prompts[0]!r}): the output")
        self.calls[-1] = replace(self.calls[-1], output=copy)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name, value in self.signature.bind(*args, **kwargs).arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise PpclError(f"{self._class()} takes any number of arguments without names; calls need names")
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return {name: value for name, value in named.items() if value is not None}

    def _keep(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        copy = self._copy(tensor)
        check_finite(copy, f"call {len(self.calls)} ({self.prompts[0]!r}): {path!r}")
        return self.known.setdefault(tensor_digest(copy), copy)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        # A tensor made in inference mode could not be trained on; a copy made outside of it can.
        with torch.inference_mode(False), torch.no_grad():
            return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def _class(self) -> str:
        return type(self.transformer).__name__


def _run(pipeline: Any, recorder: _Recorder, arguments: dict[str, Any]) -> None:
    try:
        pipeline(**arguments)
    except ValueError as error:
        # diffusers refuses arguments with a ValueError; after the first call it means another thing.
        if recorder.seen:
            raise
        reason = " ".join(str(error).split())
        raise PpclError(f"{type(pipeline).__name__} refuses its arguments: {reason}; change them") from error
    if not recorder.seen:
        raise PpclError(f"{type(pipeline).__name__} did not call its transformer; there is nothing to record")


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off for a while."""
    config = getattr(pipeline, "_progress_bar_config", None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield
    finally:
        if config is not None:
            pipeline._progress_bar_config = config
        elif hasattr(pipeline, "_progress_bar_config"):
            del pipeline._progress_bar_config
