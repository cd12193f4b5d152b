"""The options of a build, and which of them each library has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.tensorrt_api import Kind
from ppcl_fx.io.options import Bytes, Config, Flag

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX builds for: Turing, Ampere (twice), Ada, and Blackwell (twice)."""
PORTABLE = CAPABILITIES[1:]
"""Those that it builds for if nothing is said: Turing lacks much, bfloat16 above all."""


def _capability(value: str) -> str:
    if value not in CAPABILITIES:
        raise ValueError(
            f"TensorRT for RTX builds for no such compute capability{near(value, CAPABILITIES)}; it has "
            f"{', '.join(CAPABILITIES)}"
        )
    return value


def _each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(values), key=CAPABILITIES.index))


Capability = Annotated[str, AfterValidator(_capability)]


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

    gpu: Annotated[tuple[Capability, ...], AfterValidator(_each_once), Flag(metavar="8.6,8.9")] = Field(
        (), description="compute capabilities of the cards that an RTX engine is for; from 8.0 to 12.1 if left out"
    )
    builder_memory: Bytes | None = Field(
        None, description="memory that the process that builds may hold, such as 24GiB; it is ended there"
    )

    @property
    def refitting(self) -> Literal["none", "identical", "any"]:
        """How weights can be put in, with what `stripped` asks for."""
        return "identical" if self.stripped and self.refit == "none" else self.refit

    @property
    def wanted(self) -> BuildOptions:
        """The options that an engine differs by: not how much memory its builder may hold."""
        return self.model_copy(update={"builder_memory": None})

    def check(self, kind: Kind) -> None:
        """Raise `PpclError` for an option that a library does not have."""
        if kind == "tensorrt":
            if self.gpu:
                raise PpclError(
                    f"--gpu {','.join(self.gpu)}: TensorRT builds for the GPU of the machine that it runs on; leave it "
                    "out, or build for TensorRT for RTX (--for rtx)"
                )
            return
        if self.stripped:
            raise PpclError(
                "--stripped: TensorRT for RTX builds without a GPU, and cannot leave weights out there; leave it out: "
                "the engine holds its weights"
            )
        if self.refit != "none":
            raise PpclError(
                f"--refit {self.refit}: TensorRT for RTX builds without a GPU, and cannot make engines that take "
                "weights there; leave it out, and build again for other weights"
            )
