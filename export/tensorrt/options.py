"""How an engine is built: options, what each needs of a TensorRT version, and how they reach its builder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt_api import Api, version_numbers

OLDEST = (10, 15)
"""The oldest version that is supported: its parser knows Attention (from 10.14 on), RotaryEmbedding and
RMSNormalization (from 10.15 on)."""

REFIT_DROPS_BIAS = ((11, 3), (11, 4))
"""From the first version up to the second, not included, REFIT can lose the bias of a matrix product, even if no weight
is ever exchanged (NVIDIA's release notes of 11.3, known issues). REFIT_IDENTICAL does not."""


class BuildOptions(BaseModel):
    """How an engine is built.

    Attributes:
        workspace: bytes of GPU memory that a kernel may use for itself; ``None`` for all there is.
        level: TensorRT's builder optimisation level, 0 (quick to build) to 5; ``None`` for its default.
        refit: whether weights can be put in later: ``identical`` the same weights, with no loss of speed; ``any``
            other weights too, which costs fusions.
        stripped: leave the weights out of the engine; they come back from the weight store when it is loaded. Without a
            word about `refit` it is ``identical``.
        weight_streaming: bytes of weights that stay on the GPU, the others are streamed; ``None`` for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: int | None = Field(default=None, ge=1)
    level: int | None = Field(default=None, ge=0, le=5)
    refit: Literal["none", "identical", "any"] = "none"
    stripped: bool = False
    weight_streaming: int | None = Field(default=None, ge=0)

    @property
    def refitting(self) -> Literal["none", "identical", "any"]:
        """How weights can be put in, with what `stripped` asks for."""
        return "identical" if self.stripped and self.refit == "none" else self.refit


def check_version(version: str, options: BuildOptions) -> None:
    """Refuse a version of TensorRT that is too old, or that does an option wrong.

    Raises:
        PpclError: it is one.
    """
    numbers = version_numbers(version)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise PpclError(f"TensorRT {version} is too old; install {oldest} or newer: pip install -U tensorrt")
    first, mended = REFIT_DROPS_BIAS
    if options.refitting == "any" and first <= numbers < mended:
        raise PpclError(
            f"TensorRT {version} can lose biases in an engine that takes other weights; give --refit identical, or "
            f"install {'.'.join(map(str, mended))}"
        )


def network_flags(api: Api) -> int:
    """Return the flags of a network whose types are those of the ONNX file.

    From TensorRT 11 on networks are that always; the flag may go one day.
    """
    if not api.has("NetworkDefinitionCreationFlag.STRONGLY_TYPED"):
        return 0
    return 1 << int(api.value("NetworkDefinitionCreationFlag.STRONGLY_TYPED"))


def configure(api: Api, config: Any, options: BuildOptions) -> None:
    """Set a builder's options."""
    if options.workspace is not None:
        pool = api.value("MemoryPoolType.WORKSPACE")
        api.call("IBuilderConfig.set_memory_pool_limit", config, pool=pool, pool_size=options.workspace)
    if options.level is not None:
        api.set("IBuilderConfig.builder_optimization_level", config, options.level)
    flags = []
    if options.refitting == "identical":
        flags.append(api.value("BuilderFlag.REFIT_IDENTICAL"))
    if options.refitting == "any":
        flags.append(api.value("BuilderFlag.REFIT"))
    if options.stripped:
        flags.append(api.value("BuilderFlag.STRIP_PLAN"))
    if options.weight_streaming is not None:
        flags.append(api.value("BuilderFlag.WEIGHT_STREAMING"))
    for flag in flags:
        api.call("IBuilderConfig.set_flag", config, flag=flag)
