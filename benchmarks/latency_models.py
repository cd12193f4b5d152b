"""What `benchmarks.latency` measures: models at three sizes, their plans and ratios, and Table 1 beside them.

Weights are random: what a graph takes does not depend on them. A mixture is traced and cut on the meta device, and
only what is left gets memory, on the device itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, JsonValue
from torch import nn

import ppcl_fx
from benchmarks.clock import shapes_pipeline
from ppcl_fx.calls.examples import build, describe
from ppcl_fx.errors import PpclError, near
from ppcl_fx.model.paper_plans import named
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.meta_model import skeleton

SIZES = ("tiny", "small", "full")
BLOCKS = "transformer_blocks"
SINGLE = "single_transformer_blocks"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Paper(BaseModel):
    """One student of Table 1, and the teacher that it is compared to.

    Attributes:
        model: the student's name there.
        billions: its parameters in billions, and its teacher's.
        ms: its latency, and its teacher's.
        memory_pct: its GPU memory as a share of its teacher's.
    """

    model: str
    billions: tuple[float, float]
    ms: tuple[int, int]
    memory_pct: float

    @property
    def speedup(self) -> float:
        """How many times quicker than its teacher it is there."""
        return round(self.ms[1] / self.ms[0], 2)


TABLE_1 = {
    "qwen-image-14b": Paper(model="Qwen-Image, PPCL(14B)", billions=(14, 20), ms=(1792, 2625), memory_pct=79.4),
    "qwen-image-12b": Paper(model="Qwen-Image, PPCL(12B)", billions=(12, 20), ms=(1514, 2625), memory_pct=71.4),
    "qwen-image-10b": Paper(model="Qwen-Image, PPCL(10B)", billions=(10, 20), ms=(1462, 2625), memory_pct=66.9),
    "flux-dev-8b": Paper(model="FLUX.1-dev, PPCL(8B)", billions=(8, 12), ms=(535, 715), memory_pct=74.4),
}
"""The paper's own numbers. Its 6.5 B model is made from FLUX.1 Lite, so it is not beside FLUX.1-dev's here."""


class Ratio(BaseModel):
    """A share of the teacher's parameters.

    Attributes:
        keep: the share at most; 1 is the teacher.
        paper: the student of Table 1 that is of this share, or nearest to it; a key of `TABLE_1`.
        plan: the paper's plan that says which students are plugged; by default the share says it.
    """

    keep: float
    paper: str = ""
    plan: str = ""

    def students(self, model: PluggableModel) -> tuple[str, ...]:
        """Return the ids of the edits to plug."""
        if self.keep == 1:
            return ()
        if not self.plan:
            return model.plug(keep=self.keep).students
        plan = named(self.plan)
        return tuple(plan.plan().ids if plan.budget is None else plan.students(model))


class Spec(BaseModel):
    """A model to measure.

    Attributes:
        name: what it is called on the command line.
        title: what it is, in words.
        kind: diffusers' class.
        config: its configuration.
        example: one call's arguments, as `ppcl_fx.calls.examples.describe` writes them.
        dtype: "fp32" or "bf16".
        plan: the plan that all ratios are taken from.
        ratios: the teacher first.
        repeats: timed runs of each variant.
    """

    name: str
    title: str
    kind: str
    config: dict[str, Any]
    example: dict[str, JsonValue]
    dtype: str
    plan: Plan
    ratios: list[Ratio]
    repeats: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return DTYPES[self.dtype]

    def pluggable(self) -> PluggableModel:
        """Return teacher and students on the meta device."""
        gm = trace(self._model(self.config), self._arguments())
        return PluggableModel(insert_edits(gm, self.plan), self.plan).eval()

    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of each tensor of a call."""
        tensors = {name: value for name, value in self._arguments().items() if isinstance(value, torch.Tensor)}
        return {name: list(value.shape) for name, value in tensors.items()}

    def teacher_params(self) -> int:
        """Return the number of parameters of the teacher."""
        return sum(parameter.numel() for parameter in self._model(self.config).parameters())

    def shallow_teacher(self) -> torch.fx.GraphModule:
        """Return the traced teacher with three blocks in each list, on the meta device."""
        short: dict[str, Any] = {name: 3 for name in ("num_layers", "num_single_layers") if name in self.config}
        return trace(self._model({**self.config, **short}), self._arguments())

    def call(self, gm: torch.fx.GraphModule, device: torch.device) -> dict[str, Any]:
        """Return random arguments for a graph of this model, on a device."""

        def filled(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.rand(value.shape, device=device).to(value.dtype)

        return bind(gm, {name: filled(value) for name, value in self._arguments().items()})

    def _model(self, config: dict[str, Any]) -> nn.Module:
        return skeleton(diffusers_class(self.kind), config, self.torch_dtype)

    def _arguments(self) -> dict[str, Any]:
        return {name: build(value, {torch.float32: self.torch_dtype}) for name, value in self.example.items()}


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give a module's weights memory on a device, with random values made there; buffers are moved.

    Norms are 1 and products keep their inputs' size, so that activations stay finite at any depth.
    """
    made: dict[int, nn.Parameter] = {}
    generator = torch.Generator(device).manual_seed(0)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.ndim > 1:
                    value.normal_(0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)
                elif name == "bias":
                    value.normal_(0, 0.02, generator=generator)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            child._parameters[name] = made[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)


# ---- the models ----------------------------------------------------------------------------------------------------


def specs(size: str, dtype: str | None, names: Sequence[str]) -> list[Spec]:
    """Return the models of a size.

    Args:
        size: one of `SIZES`.
        dtype: "fp32" or "bf16"; by default what suits the size.
        names: which of them; all when empty.

    Raises:
        PpclError: there is no such size or model.
    """
    makers = {"tiny": (_tiny_qwen, _tiny_flux), "small": (_shapes, _small_qwen, _small_flux), "full": (_qwen, _flux)}
    if size not in makers:
        raise PpclError(f"--size {size}: no such size{near(size, makers)}; it is one of {', '.join(makers)}")
    known = {maker.__name__.split("_")[-1]: maker for maker in makers[size]}
    for name in names:
        if name not in known:
            raise PpclError(f"--models {name}: not at size {size}{near(name, known)}; there are {', '.join(known)}")
    wanted = [maker for name, maker in known.items() if name in (names or known)]
    return [maker(dtype or ("bf16" if size == "full" else "fp32")) for maker in wanted]


def _example(**arguments: Any) -> dict[str, JsonValue]:
    return {name: describe(value) for name, value in arguments.items()}


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _qwen_call(side: int, text: int, channels: int = 64, joint: int = 3584) -> dict[str, JsonValue]:
    return _example(
        hidden_states=_empty(1, side * side, channels),
        encoder_hidden_states=_empty(1, text, joint),
        timestep=_empty(1),
        img_shapes=[[(1, side, side)]],
    )


def _flux_call(side: int, text: int, channels: int = 64, joint: int = 4096, pooled: int = 768) -> dict[str, JsonValue]:
    return _example(
        hidden_states=_empty(1, side * side, channels),
        encoder_hidden_states=_empty(1, text, joint),
        pooled_projections=_empty(1, pooled),
        timestep=_empty(1),
        img_ids=_empty(side * side, 3),
        txt_ids=_empty(text, 3),
        guidance=_empty(1),
    )


QWEN, FLUX = "QwenImageTransformer2DModel", "FluxTransformer2DModel"


def _qwen(dtype: str) -> Spec:
    """Qwen-Image as released: the 10 B plan; 12 and 14 B swap students back within their budgets."""
    return Spec(
        kind=QWEN,
        config={"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
        name="qwen",
        title="Qwen-Image, 60 blocks of width 3072, 1328x1328 (6889 image tokens, 128 text tokens)",
        example=_qwen_call(1328 // 16, 128),
        dtype=dtype,
        plan=named("paper:qwen-image-10b").plan(),
        ratios=[
            Ratio(keep=1.0),
            Ratio(keep=0.6852, paper="qwen-image-14b", plan="paper:qwen-image-14b"),  # 14 of 20.43 B
            Ratio(keep=0.5873, paper="qwen-image-12b", plan="paper:qwen-image-12b"),  # 12 of 20.43 B
            Ratio(keep=0.5154, paper="qwen-image-10b", plan="paper:qwen-image-10b"),  # every student: 10.53 B
        ],
        repeats=11,
    )


def _flux(dtype: str) -> Spec:
    """FLUX.1-dev as released: the paper's intervals as printed leave 6.5 B; 8 B swaps students back."""
    return Spec(
        kind=FLUX,
        config={"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True},
        name="flux",
        title="FLUX.1-dev, 19 and 38 blocks of width 3072, 1024x1024 (4096 image tokens, 512 text tokens)",
        example=_flux_call(1024 // 16, 512),
        dtype=dtype,
        plan=named("paper:flux-dev-6.5b").plan(),
        ratios=[
            Ratio(keep=1.0),
            Ratio(keep=0.6721, paper="flux-dev-8b", plan="paper:flux-dev-8b"),  # 8 of 11.90 B
            Ratio(keep=0.548, plan="paper:flux-dev-6.5b"),  # every student: 6.52 B
        ],
        repeats=11,
    )


def _depth(stack: str, *intervals: tuple[int, int]) -> list[Edit]:
    return [DepthEdit(stack=stack, first=first, last=last) for first, last in intervals]


FIFTH = Plan(
    edits=[
        *_depth(BLOCKS, (1, 2), (3, 5), (6, 8)),
        TextStreamEdit(stack=BLOCKS, source=9, last=11),
        FfnEdit(stack=BLOCKS, block=11),
    ]
)
"""A fifth of the paper's 10 B plan of Qwen-Image, for 12 blocks: 5 removed, 2 without text, 1 without feed-forward."""


def _small_qwen(dtype: str) -> Spec:
    return Spec(
        kind=QWEN,
        config={"num_layers": 12, "num_attention_heads": 4, "attention_head_dim": 128},
        name="qwen",
        title="Qwen-Image, 12 blocks of width 512 (256 image tokens, 64 text tokens)",
        example=_qwen_call(16, 64),
        dtype=dtype,
        plan=FIFTH,
        ratios=[
            Ratio(keep=1.0),
            Ratio(keep=0.7, paper="qwen-image-14b"),
            Ratio(keep=0.6, paper="qwen-image-12b"),
            Ratio(keep=0.52, paper="qwen-image-10b"),
        ],
        repeats=7,
    )


def _small_flux(dtype: str) -> Spec:
    return Spec(
        kind=FLUX,
        config={"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 4, "guidance_embeds": True},
        name="flux",
        title="FLUX.1-dev, 4 and 8 blocks of width 512 (256 image tokens, 64 text tokens)",
        example=_flux_call(16, 64),
        dtype=dtype,
        plan=Plan(edits=[*_depth(BLOCKS, (1, 3)), *_depth(SINGLE, (0, 1), (2, 3), (4, 5))]),
        ratios=[Ratio(keep=1.0), Ratio(keep=0.75, paper="flux-dev-8b"), Ratio(keep=0.6)],
        repeats=7,
    )


def _tiny_qwen(dtype: str) -> Spec:
    config = {
        "num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6],
        "in_channels": 16, "out_channels": 4, "joint_attention_dim": 24,
    }  # fmt: skip
    plan = Plan(edits=[*_depth(BLOCKS, (1, 2), (3, 4)), FfnEdit(stack=BLOCKS, block=5)])
    return Spec(
        kind=QWEN,
        config=config,
        name="qwen",
        title="Qwen-Image, 6 blocks of width 32 (16 image tokens, 5 text tokens)",
        example=_qwen_call(4, 5, 16, 24),
        dtype=dtype,
        plan=plan,
        ratios=[Ratio(keep=1.0), Ratio(keep=0.7, paper="qwen-image-12b")],
        repeats=3,
    )


def _tiny_flux(dtype: str) -> Spec:
    config = {
        "num_layers": 4, "num_single_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    return Spec(
        kind=FLUX,
        config=config,
        name="flux",
        title="FLUX.1-dev, 4 and 4 blocks of width 32 (16 image tokens, 5 text tokens)",
        example=_flux_call(4, 5, 16, 24, 20),
        dtype=dtype,
        plan=Plan(edits=[*_depth(BLOCKS, (1, 3)), *_depth(SINGLE, (0, 1))]),
        ratios=[Ratio(keep=1.0), Ratio(keep=0.65, paper="flux-dev-8b")],
        repeats=3,
    )


def _shapes(dtype: str) -> Spec:
    """The model that ships, by a plan that the paper's rule makes for half of its parameters."""
    from ppcl_fx.shapes.captions import every_prompt

    pipeline = shapes_pipeline()
    prompts = [prompt.text for prompt in every_prompt("position")][:8]
    calls = ppcl_fx.record(pipeline, prompts, batch_size=8, num_inference_steps=4, seed=0)
    gm = trace(pipeline.transformer, calls.examples())
    plan = ppcl_fx.select(ppcl_fx.analyze(gm, calls), keep=0.5, config=RewriteConfig(select="paper"))
    example = {name: value for name, value in calls[0].kwargs.items() if name != "return_dict"}
    return Spec(
        kind=type(pipeline.transformer).__name__,
        config=dict(gm.meta["ppcl"]["config"]),
        name="shapes",
        title="shapes, the model that ships: 16 blocks of width 96 (8 samples of 64 image tokens)",
        example=_example(**example),
        dtype=dtype,
        plan=plan,
        ratios=[Ratio(keep=keep) for keep in (1.0, 0.7, 0.6, 0.5)],
        repeats=15,
    )


def stored_bytes(pluggable: PluggableModel) -> int:
    """Return the bytes of teacher and students together: what an export writes."""
    return sum(p.numel() * p.element_size() for p in pluggable.graph.parameters())


__all__ = ["SIZES", "TABLE_1", "Paper", "Ratio", "Spec", "materialise", "specs", "stored_bytes"]
