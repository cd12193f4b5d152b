"""How an engine is built: options, what each needs of a TensorRT version, and how they reach its builder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt_api import Api, version_numbers
from ppcl_fx.io.options import Bytes, Config, Flag

OLDEST = (10, 15)
"""The oldest version that is supported: its parser knows Attention (from 10.14 on), RotaryEmbedding and
RMSNormalization (from 10.15 on)."""

REFIT_DROPS_BIAS = ((11, 3), (11, 4))
"""From the first version up to the second, not included, REFIT can lose the bias of a matrix product, even if no weight
is ever exchanged (NVIDIA's release notes of 11.3, known issues). REFIT_IDENTICAL does not."""


class BuildOptions(Config):
    """How an engine is built.

    Without a word about `refit`, `stripped` makes it ``identical``: the weights come back from the weight store when
    the engine is loaded.
    """

    workspace: Bytes | None = Field(None, description="GPU memory that a kernel may use for itself, such as 4GiB")
    level: int | None = Field(None, ge=0, le=5, description="builder's effort; TensorRT's default is 3")
    refit: Annotated[Literal["none", "identical", "any"], Flag(metavar="KIND")] = Field(
        "none", description="weights that can be put in later: 'none', 'identical' ones, or 'any' (slower)"
    )
    stripped: bool = Field(False, description="engines without weights; they come at load")
    weight_streaming: Bytes | None = Field(
        None, description="weights that stay on the GPU, such as 8GiB; the rest streams"
    )

    @property
    def refitting(self) -> Literal["none", "identical", "any"]:
        """How weights can be put in, with what `stripped` asks for."""
        return "identical" if self.stripped and self.refit == "none" else self.refit


def check_version(version: str, options: BuildOptions) -> None:
    """Raise `PpclError` for a version of TensorRT that is too old, or that does an option wrong."""
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
