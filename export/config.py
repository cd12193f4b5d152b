"""The options of an export: flags, Python and docs are made from this one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppcl_fx.export.tensorrt.profiles import check_spec
from ppcl_fx.export.tensorrt.request import EngineConfig
from ppcl_fx.export.tensorrt_api import Kind
from ppcl_fx.io.options import MOST, Bytes, Config, Count, Flag, Shares, Tolerance, flag_of

if TYPE_CHECKING:
    import torch

Format = Literal["onnx", "tensorrt", "rtx", "trtexec", "diffusers", "released"]

KEEPS = (1.0, 0.7, 0.6, 0.5)
"""The shares that are exported if nothing else is said."""
ENGINES = ("tensorrt", "rtx", "trtexec")
"""Formats that engines are built from."""
FOLDERS = ("diffusers", "released")
"""Formats that are model folders; they need neither onnxruntime nor calls."""
ROUNDED_FOR_CALLS = "rounding needs the inputs that layers have on recorded calls; give --calls"
"""Why weights in few bits need calls."""
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
    format: Annotated[Format, Flag(metavar="NAME")] = Field(
        "onnx",
        description="'onnx'; 'tensorrt' or 'rtx' (TensorRT for RTX) for an engine beside each ONNX file; 'trtexec' for "
        "a script that builds them; 'diffusers' for folders that diffusers loads by itself (depth edits alone); or "
        "'released' for the layout of the paper's checkpoints",
    )
    dtype: Annotated[Literal["stored", "fp32", "bf16", "fp16"], BeforeValidator(_dtype), Flag(metavar="NAME")] = Field(
        "stored",
        description="type of the weights and floating-point inputs: 'stored', 'fp32', 'bf16' or 'fp16'. Another one "
        "than they are stored in costs one converted copy of them. 'fp16' needs --calls, and is refused where they "
        "come near its range",
    )
    weights: Annotated[Literal["stored", "int8", "int4", "fp8"], Flag(metavar="NAME")] = Field(
        "stored",
        description="linear layers' weights in few bits: 'int8', 'int4' or 'fp8', rounded for the inputs that they "
        "have on --calls. With 'fp8' the layers' inputs are in 8 bits too",
    )
    block: int | None = Field(
        None,
        ge=2,
        le=MOST,
        description="weights of a row that share a scale, for --weights; a whole row if left out, and 32 for 'int4'",
    )
    weight_error: Tolerance | None = Field(
        None,
        description="largest relative error of the output on the recorded calls that --weights may add; the layers "
        "that do most to it stay as they are",
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
    build: EngineConfig = Field(EngineConfig(), description="for which sizes, and how, engines are built")

    @property
    def library(self) -> Kind:
        """The library that engines are built with."""
        return "rtx" if self.format == "rtx" else "tensorrt"

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
            asked += self.build.asked()
            if asked:
                raise ValueError(
                    f"{asked[0]}: only for --format {' or '.join(ENGINES)}; leave it out, or name that format"
                )
        for name in self.given(("block", "weight_error")):
            if self.weights == "stored":
                raise ValueError(f"{flag_of(ExportConfig, name)}: only with --weights; leave it out, or give int4")
        if self.format in FOLDERS:
            compared = "model folders are not compared with PyTorch; leave it out, or export onnx"
            other = f"not for --format {self.format}; leave it out"
            for name in self.given((*COMPARING, "dtype", "weights", "attention", "embed", "memory_limit")):
                raise ValueError(f"{flag_of(ExportConfig, name)}: {compared if name in COMPARING else other}")
        check_spec(self.build.spec)
        self.build.options.check(self.library)
        return self
