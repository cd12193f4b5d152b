"""The options of an export: flags, Python and docs are made from this one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppcl_fx.export.tensorrt.profiles import check_spec
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.options import MOST, Bytes, Config, Count, Flag, Shares, Tolerance, flag_of

if TYPE_CHECKING:
    import torch

KEEPS = (1.0, 0.7, 0.6, 0.5)
"""The shares that are exported if nothing else is said."""
ENGINES = ("tensorrt", "trtexec")
"""Formats that TensorRT engines are built from."""
FOLDERS = ("diffusers", "released")
"""Formats that are model folders; they need neither onnxruntime nor calls."""
COMPARING = ("tolerance", "check_calls", "sampling_tolerance", "runs")
DTYPES = {"stored": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _dtype(value: object) -> object:
    """Take a type of PyTorch for its name, too."""
    names = {f"torch.{long}": short for short, long in DTYPES.items()} | {"None": "stored"}
    return names.get(str(value), value)


class ExportConfig(Config):
    """Every option of `ppcl_fx.export.export` and of ``ppcl-fx export``.

    The sampling tolerance is its own: a run adds up the errors of its steps, and guidance multiplies them. At 1e-3 a
    picture in [0, 1] is off by a quarter of one of 256 levels on average (root mean square), or less: nobody sees it.
    """

    keep: Shares | None = Field(
        None,
        description="shares of the parameters that stay, with commas; one file each. 1.0,0.7,0.6,0.5 if left out; a "
        "fine-tuned model has one",
    )
    format: Annotated[Literal["onnx", "tensorrt", "trtexec", "diffusers", "released"], Flag(metavar="NAME")] = Field(
        "onnx",
        description="'onnx', 'tensorrt' for an engine beside each ONNX file, 'trtexec' for a script that builds them, "
        "'diffusers' for folders that diffusers loads by itself (depth edits alone), or 'released' for the layout of "
        "the paper's checkpoints",
    )
    dtype: Annotated[Literal["stored", "fp32", "bf16", "fp16"], BeforeValidator(_dtype), Flag(metavar="NAME")] = Field(
        "stored",
        description="type of the weights and floating-point inputs: 'stored', 'fp32', 'bf16' or 'fp16'. Another one "
        "than they are stored in costs one converted copy of them. 'fp16' needs --calls, and is refused where they "
        "come near its range",
    )
    attention: Annotated[Literal["auto", "primitive"], Flag(metavar="NAME")] = Field(
        "auto",
        description="'auto' for the operator Attention, which engines fuse where they have a kernel and take apart "
        "where not; 'primitive' for products and a softmax, for runtimes that do not know that operator",
    )
    embed: bool = Field(False, description="write ordinary files that hold their weights, a copy for each share")
    memory_limit: Bytes = Field(
        12 * 2**30,
        description="memory that loading a student and checking its graphs may take; else nothing is compared",
    )
    tolerance: Tolerance = Field(
        1e-4,
        description="largest difference on the shapes and largest relative error on a recorded call that are allowed",
    )
    check_calls: int = Field(
        8, ge=0, le=MOST, description="recorded calls to compare, from the earliest timestep to the latest"
    )
    sampling_tolerance: Tolerance = Field(1e-3, description="largest relative error of a sampling run's results")
    runs: Count = Field(10, description="runs timed for the latency")
    onnx_only: bool = Field(
        False, description="build no engine; 'ppcl-fx build ENGINES' does so, on another machine perhaps"
    )
    overwrite: bool = Field(False, description="replace the files of these shares where they exist")
    build: BuildConfig = Field(BuildConfig(), description="for which sizes, and how, engines are built")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type of the weights; None for the one that they are stored in."""
        import torch

        name = DTYPES[self.dtype]
        return None if name is None else getattr(torch, name)

    @model_validator(mode="after")
    def _fits(self) -> ExportConfig:
        if self.format not in ENGINES:
            asked = ["--onnx-only"] if self.onnx_only else []
            parts = (self.build.spec, self.build.options)
            asked += [flag_of(type(part), name) for part in parts for name in part.given(type(part).model_fields)]
            if asked:
                raise ValueError(
                    f"{asked[0]}: only for --format {' or '.join(ENGINES)}; leave it out, or name that format"
                )
        if self.format in FOLDERS:
            compared = "model folders are not compared with PyTorch; leave it out, or export onnx"
            other = f"not for --format {self.format}; leave it out"
            for name in self.given((*COMPARING, "dtype", "attention", "embed", "memory_limit")):
                raise ValueError(f"{flag_of(ExportConfig, name)}: {compared if name in COMPARING else other}")
        check_spec(self.build.spec)
        return self
