"""How engines run: the options of `EngineTransformer` that its files do not fix."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppcl_fx.io.options import Config


class RuntimeOptions(Config):
    """How an engine runs."""

    cuda_graphs: bool = Field(
        True, description="repeat calls of the same shapes as CUDA graphs; TensorRT for RTX makes its own"
    )
    specialisation: Literal["lazy", "eager", "none"] = Field(
        "lazy",
        description="RTX: kernels for the sizes of a call are compiled while others run, before its first run, or not",
    )
    kernel_cache: bool = Field(
        True, description="RTX: keep the kernels that were compiled on this card beside the engine"
    )
