"""What each block costs in milliseconds, and what each edit leaves of it: the JSON file of `benchmarks.blocks`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import Record

Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BlockCost(Record):
    """One block's milliseconds, projectors included; None where an edit is not possible or was not measured.

    A block that a depth edit removes costs nothing, and its interval's student what the interval's first block costs.
    ffn: with projectors for its feed-forwards. text: without its text stream, in the middle of a group. text_last:
    as the last block of one (one projector more). text_last_ffn: and with projectors for the feed-forwards left.
    """

    whole: Time
    ffn: Time | None = None
    text: Time | None = None
    text_last: Time | None = None
    text_last_ffn: Time | None = None


class StackCost(Record):
    """One stack: its ModuleList's path, the index of its first block there, and its blocks in order."""

    path: str
    first: int = Field(ge=0)
    blocks: list[BlockCost] = Field(min_length=1)


class Costs(Record):
    """What the parts of a model (its fingerprint) cost in one call of these inputs' shapes, on one machine.

    repeats: runs that the medians are over. rest: what lies outside of the blocks. forward: the whole graph, uncut.
    """

    version: Literal[1] = 1
    unit: Literal["ms"] = "ms"
    model: str
    machine: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, list[int]] = Field(default_factory=dict)
    repeats: int = Field(ge=1)
    rest: Time
    forward: Time | None = None
    stacks: list[StackCost] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> Costs:
        names = Counter(f"{one.path}.{one.first + i}" for one in self.stacks for i in range(len(one.blocks)))
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"block {name} is there twice")
        return self

    @property
    def total(self) -> float:
        """The teacher's milliseconds: the blocks' and the rest's."""
        return self.rest + sum(block.whole for stack in self.stacks for block in stack.blocks)

    def milliseconds(self, latency: float | str) -> float:
        """Return what a share of the teacher's time, in (0, 1], or a time such as ``120ms`` stands for.

        Raises:
            PpclError: it is neither.
        """
        text = str(latency).strip().lower()
        in_ms = text.endswith("ms")
        try:
            number = float(text.removesuffix("ms"))
        except ValueError:
            number = 0.0
        if in_ms and 0.0 < number < float("inf"):
            return number
        if not in_ms and 0.0 < number <= 1.0:
            return number * self.total
        raise PpclError(
            f"latency {latency}: neither a share of the teacher's time, above 0 and at most 1, nor a time such as 120ms"
        )
