"""Pipeline arguments: what a diffusers pipeline is called with for some of the prompts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ppcl_fx.errors import PpclError, near

_PICTURES = re.compile(r"num_\w+_per_prompt")
"""How diffusers' pipelines name the number of pictures, videos or waveforms of one prompt."""


@dataclass(frozen=True)
class PipelineArguments:
    """The arguments of a pipeline for all prompts, divided among its runs.

    What a prompt gets depends on the prompt and its place alone: number i starts from noise of the seed ``seed + i``.
    An argument holds one item, or one row of a tensor, a prompt by its name: those with ``prompt`` in it, ``latents``
    and ``generator`` (of noise, one a picture); what takes the place of ``prompt`` in a pipeline that has none
    (``class_labels``; else prompts are numbers); and those in `per_prompt`. Any other argument goes whole to each run:
    a list of reference pictures belongs to each prompt.
    """

    pipeline: Any
    texts: Sequence[str]
    given: Mapping[str, Any]
    seed: int = 42
    per_prompt: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise PpclError("there are no prompts to record; give at least one")
        if "prompt" in self.given:
            raise PpclError("'prompt' is given twice; give it as `prompts` only")
        known = self._known
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        odd = next((name for name in self.given if name not in known and not open_ended), None)
        if odd is not None:
            raise PpclError(f"{type(self.pipeline).__name__} takes no argument {odd!r}{near(odd, known)}")
        odd = next((name for name in self.per_prompt if name not in self.given), None)
        if odd is not None:
            raise PpclError(f"per_prompt names {odd!r}, which is not among the arguments{near(odd, self.given)}")
        if len(self.texts) > 1:
            self._check_divided()

    def runs(self, batch_size: int) -> list[range]:
        """Return the prompts of each run of the pipeline, by number."""
        if batch_size < 1:
            raise PpclError(f"the batch size is {batch_size}; use 1 or more")
        # Where the pipeline takes a single generator, the noise of a second prompt would depend on the first.
        size = 1 if self._seeded() and not self._takes_generators() else batch_size
        numbers = range(len(self.texts))
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def of(self, part: range) -> dict[str, Any]:
        """Return the arguments of the run that draws the prompts of these numbers."""
        arguments = dict(self.given)
        for name, value in self.given.items():
            each = self._each(name, value)
            if each and len(self.texts) > 1:
                arguments[name] = value[part.start * each : part.stop * each]
        condition = self._condition
        encoded = any(name.startswith("prompt_embeds") and value is not None for name, value in arguments.items())
        if condition not in arguments and not encoded:
            texts = [self.texts[i] for i in part]
            arguments[condition] = texts if condition == "prompt" else self._labels(texts, condition)
        if "output_type" in self._known and getattr(self.pipeline, "vae", None) is not None:
            arguments.setdefault("output_type", "latent")
        if self._seeded():
            # A prompt's further pictures have seeds far from those of other prompts.
            seeds = [self.seed + i + 1_000_003 * j for i in part for j in range(self._pictures())]
            made = [torch.Generator().manual_seed(seed) for seed in seeds]
            arguments["generator"] = made if self._takes_generators() else made[0]
        return arguments

    @cached_property
    def _known(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.pipeline.__call__).parameters

    @cached_property
    def _condition(self) -> str:
        """The argument that says what to draw: ``prompt``, or the first one where there is none of that name."""
        named = (name for name, p in self._known.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return "prompt" if "prompt" in self._known else next(named, "prompt")

    def _labels(self, texts: list[str], condition: str) -> list[int]:
        try:
            return [int(text) for text in texts]
        except ValueError:
            who = type(self.pipeline).__name__
            why = f"{who} takes no prompt, and {texts[0]!r} is no number of a class"
            raise PpclError(f"{why}; give {condition}=, one for each prompt") from None

    def _pictures(self) -> int:
        """Return how many pictures a prompt gets."""
        named = {name: p.default for name, p in self._known.items() if _PICTURES.fullmatch(name)}
        counts = (default if self.given.get(name) is None else self.given[name] for name, default in named.items())
        return next((count for count in counts if isinstance(count, int)), 1)

    def _seeded(self) -> bool:
        return "generator" in self._known and self.given.get("generator") is None

    def _takes_generators(self) -> bool:
        """Tell whether the pipeline's ``generator`` may be a list, by its annotation; diffusers' all have one."""
        return "list" in str(self._known["generator"].annotation).lower()

    def _each(self, name: str, value: Any) -> int:
        """Return how many items, or rows, a prompt has of an argument: of noise one a picture; 0 if it goes whole."""
        many = value.ndim > 0 if isinstance(value, torch.Tensor) else isinstance(value, list | tuple)
        if many and name in ("latents", "generator"):
            return self._pictures()
        return int(many and ("prompt" in name or name in (self._condition, *self.per_prompt)))

    def _check_divided(self) -> None:
        """Refuse an argument that cannot be divided among several prompts."""
        for name, value in self.given.items():
            each = self._each(name, value)
            items = each * len(self.texts)
            if name == "generator" and isinstance(value, torch.Generator):
                why = "one generator for several prompts makes a prompt's noise depend on the others"
                raise PpclError(f"{why}; give seed=, or a list with one generator a prompt")
            if name in self.per_prompt and not each:
                raise PpclError(f"per_prompt names {name!r}, a {type(value).__name__}; give a list or a tensor")
            if each and len(value) != items:
                has = f"{len(value)} {'rows' if isinstance(value, torch.Tensor) else 'items'}"
                why = f"{name!r} has {has} and {len(self.texts)} prompts need {items}"
                raise PpclError(f"{why}; give as many, or record one prompt at a time")


def run_arguments(
    pipeline: Any, prompts: Sequence[str], *, steps: int | None = None, seed: int = 42, **pipeline_kwargs: Any
) -> dict[str, Any]:
    """Return the arguments with which `ppcl_fx.record` calls a pipeline for prompts that are drawn in one run."""
    arguments = PipelineArguments(pipeline, list(prompts), with_steps(pipeline_kwargs, steps), seed)
    return arguments.of(range(len(prompts)))


def with_steps(given: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """Return a pipeline's arguments with its number of denoising steps, where one is given."""
    return {**given, **({} if steps is None else {"num_inference_steps": steps})}
