"""Plans: the chosen edits of a model, as validated JSON. A plan can be written by hand and diffed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import Record

INITS = ("first", "middle")


class _Edit(Record):
    """An edit in the `ModuleList` at a path; `damage` is predicted, in the units of the rule that chose it."""

    stack: str
    damage: float | None = None


class DepthEdit(_Edit):
    """Blocks ``first`` to ``last`` (inclusive) become one student block.

    `init` says whose weights it starts from: block ``first`` (Sec. 3.3) or the one in the middle.
    """

    kind: Literal["depth"] = "depth"
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    init: Literal["first", "middle"] = "first"

    @model_validator(mode="after")
    def _two_blocks(self) -> DepthEdit:
        if self.last <= self.first:
            raise ValueError(f"an interval needs at least two blocks, [{self.first}, {self.last}] has fewer")
        return self

    @property
    def id(self) -> str:
        """The edit's name, ``depth:transformer_blocks.3-5``."""
        return f"depth:{self.stack}.{self.first}-{self.last}"


class FfnEdit(_Edit):
    """The feed-forwards of a block, in every stream, become linear projectors (Eq. 9)."""

    kind: Literal["ffn"] = "ffn"
    block: int = Field(ge=0)

    @property
    def id(self) -> str:
        """The edit's name, ``ffn:transformer_blocks.2``."""
        return f"ffn:{self.stack}.{self.block}"


class TextStreamEdit(_Edit):
    """Blocks ``(source, last]`` lose their text stream; block ``source`` is where the text state comes from (Eq. 8)."""

    kind: Literal["text_stream"] = "text_stream"
    source: int = Field(ge=0)
    last: int = Field(ge=0)

    @model_validator(mode="after")
    def _one_block(self) -> TextStreamEdit:
        if self.last <= self.source:
            raise ValueError(f"a text group needs a block after its source, [{self.source}, {self.last}] has none")
        return self

    @property
    def id(self) -> str:
        """The edit's name, ``text_stream:transformer_blocks.50-59``."""
        return f"text_stream:{self.stack}.{self.source}-{self.last}"


Edit = Annotated[DepthEdit | FfnEdit | TextStreamEdit, Field(discriminator="kind")]


class Plan(Record, frozen=False):
    """Edits of one model, in the order in which they were chosen.

    Attributes:
        model: fingerprint of the teacher it was made for; empty in a plan written by hand.
        params: parameters with every edit applied.
        reason: why these, in words, for the report.
    """

    version: Literal[1] = 1
    model: str = ""
    teacher_params: int = 0
    params: int = 0
    edits: list[Edit] = Field(default_factory=list)
    reason: list[str] = Field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """The edits' names, in order."""
        return [edit.id for edit in self.edits]

    def depth(self, stack: str | None = None) -> list[DepthEdit]:
        """Return the depth edits, of one `ModuleList` if given, by their first block."""
        found = [e for e in self.edits if isinstance(e, DepthEdit) and stack in (None, e.stack)]
        return sorted(found, key=lambda e: (e.stack, e.first))

    def check(self) -> None:
        """Raise `PpclError` where edits overlap or are given twice."""
        for name in self.ids:
            if self.ids.count(name) > 1:
                raise PpclError(f"the plan holds {name} twice; remove one")
        for before, after in itertools.pairwise(self.depth()):
            if before.stack == after.stack and after.first <= before.last:
                raise PpclError(
                    f"the intervals [{before.first}, {before.last}] and [{after.first}, {after.last}] of "
                    f"{after.stack} overlap; let the second begin at {before.last + 1} or later"
                )
        groups = sorted((e for e in self.edits if isinstance(e, TextStreamEdit)), key=lambda e: (e.stack, e.source))
        for one, two in itertools.pairwise(groups):
            if one.stack == two.stack and two.source < one.last:
                raise PpclError(f"the text groups {one.id} and {two.id} overlap; let the second begin at {one.last}")


def plan_digest(plan: Plan) -> str:
    """Return a digest of a plan's model and edits; what was predicted of them, and why, does not count."""
    edits = [edit.model_dump(mode="json", exclude={"damage"}) for edit in plan.edits]
    content = {"model": plan.model, "teacher_params": plan.teacher_params, "edits": edits}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def known(ids: Sequence[str], names: Sequence[str]) -> None:
    """Raise `PpclError` for the first of `names` that is not among `ids`, with a near match."""
    for name in names:
        if name not in ids:
            have = ", ".join(ids) or "none"
            raise PpclError(f"no edit {name!r} in this model{near(name, ids)}; its edits are {have}")
