"""A whole sampling run with an exported file in a pipeline, beside the same run with PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch

from ppcl_fx.calls.pipeline_arguments import run_arguments
from ppcl_fx.calls.record import quiet
from ppcl_fx.errors import PpclError
from ppcl_fx.export.verify.metrics import SamplingAgreement, agreement, worst
from ppcl_fx.export.verify.reference import Answer, Answers
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.face import PipelineFace


@dataclass(frozen=True)
class SamplingRun:
    """What to draw, and with which pipeline, to compare an exported file with PyTorch over all steps of a run.

    Attributes:
        pipeline: a diffusers pipeline of the model's family; its transformer is not used.
        prompts: one picture each, all in one run. With ``prompt_embeds`` among the arguments they are names only.
        seed: prompt number i starts from noise of the seed ``seed + i``, as in `ppcl_fx.record`.
        steps: denoising steps; the pipeline's own number when None.
        arguments: more arguments of the pipeline.
        score: gives the score of pictures, shape (prompts, channels, height, width) with values in [0, 1], for their
            prompts. For pipelines that give pictures and no latents.
    """

    pipeline: Any
    prompts: Sequence[str]
    seed: int = 42
    steps: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[torch.Tensor, Sequence[str]], float] | None = None


class InPipeline(PipelineFace):
    """Stands in the place of a pipeline's transformer: one of two answers is asked, and its calls are counted."""

    KIND = "a stand-in that compares"
    device = torch.device("cpu")

    def __init__(self, answers: Answers, answer: Answer) -> None:
        super().__init__()
        self._answers, self._answer = answers, answer
        self.calls = 0

    @property
    def config(self) -> Any:
        """The teacher's configuration, as diffusers pipelines read it."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(graph_info(self._answers.prepared.gm).get("config", {}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self._answers.dtype

    def _class_config(self) -> Any:
        return self.config if "_answers" in self.__dict__ else None

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Answer a call of the transformer; GuardError where the model was traced for another kind of call."""
        named = dict(zip(graph_info(self._answers.prepared.gm)["signature"], args, strict=False)) | kwargs
        self.calls += 1
        result = self._answer(self._answers.call(named))
        if not return_dict:
            return (result,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result)


def compare_runs(run: SamplingRun, answers: Answers) -> SamplingAgreement:
    """Draw the same prompts from the same noise with PyTorch and with an exported file, and compare what comes out.

    Latents are compared where the pipeline has a VAE, which is then not run; else its pictures.

    Raises:
        PpclError: the pipeline refuses its arguments, never calls its transformer, or gives no tensor.
    """
    results = [_draw(run, InPipeline(answers, answer)) for answer in (answers.pytorch, answers.exported)]
    (expected, calls), (found, _) = results
    if len(found) != len(expected):
        raise PpclError(f"{_name(run)} gave {len(found)} pictures with the file and {len(expected)} with PyTorch")
    times = len(expected) // len(run.prompts)  # several for a prompt, where the arguments say so
    names = [f"the prompt {shorten(text, 60)!r}" for text in run.prompts for _ in range(times)]
    if len(names) != len(expected):
        names = [f"picture {number}" for number in range(len(expected))]
    over_all = worst([agreement(*one) for one in zip(found, expected, names, strict=True)])
    scores = [None, None] if run.score is None else [run.score(drawn, run.prompts) for drawn in (found, expected)]
    return SamplingAgreement(
        **over_all.model_dump(), transformer_calls=calls, seed=run.seed, score=scores[0], score_pytorch=scores[1]
    )


def _draw(run: SamplingRun, transformer: InPipeline) -> tuple[torch.Tensor, int]:
    """Run the pipeline once; return the result, a row a picture, and the calls of the transformer."""
    pipeline = run.pipeline
    arguments = run_arguments(pipeline, run.prompts, steps=run.steps, seed=run.seed, **run.arguments)
    if "output_type" in inspect.signature(pipeline.__call__).parameters:
        arguments.setdefault("output_type", "pt")  # it is "latent" already where there is a VAE
    own = getattr(pipeline, "transformer", None)
    pipeline.transformer = transformer
    try:
        with torch.no_grad(), quiet(pipeline), torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # for what draws noise of its own accord
            result = pipeline(**arguments)[0]
    except ValueError as error:
        if transformer.calls:
            raise
        reason = " ".join(str(error).split())
        raise PpclError(f"{_name(run)} refuses its arguments: {reason}; change them") from error
    finally:
        pipeline.transformer = own
    if not transformer.calls:
        raise PpclError(f"{_name(run)} did not call its transformer; there is nothing to compare")
    if not isinstance(result, torch.Tensor) or result.ndim == 0:
        raise PpclError(f"{_name(run)} gives a {type(result).__name__} and no tensor; ask for one by output_type")
    return result.detach().cpu(), transformer.calls


def _name(run: SamplingRun) -> str:
    return type(run.pipeline).__name__
