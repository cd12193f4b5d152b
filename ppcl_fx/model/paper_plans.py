"""The paper's plans by name: ``paper:qwen-image-12b`` and so on, from a data file of the package.

A name stands for data, not for code: a plan is applied to whatever model has the blocks that it was made for.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ppcl_fx.errors import PpclError, Refusal, near
from ppcl_fx.io.files import Record, read_json
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.model.pluggable import PluggableModel

FILE = Path(__file__).with_name("plans.json")
PREFIX = "paper:"

Spans = dict[str, list[tuple[int, int]]]
"""Block list -> pairs of blocks, from 0 and inclusive."""


class NamedPlan(Record):
    """A plan of the paper, as the file has it; `named` gives it its name, and what it has from the plan it extends.

    Attributes:
        blocks: block list -> how many blocks the model has that it was made for.
        edits: the edits, depth first, in the paper's order. They need not be a plan: see `plan`.
        params: parameters that the paper's model has with every edit plugged; 0 where the edits are no plan.
        budget: where the paper names a size and not its blocks, that size in parameters; students are swapped
            back to their teacher within it (`students`).
        says: what it is, and what the paper leaves open.
    """

    name: str = ""
    extends: str = ""
    blocks: dict[str, int] = Field(default_factory=dict)
    depth: Spans = Field(default_factory=dict)
    text_stream: Spans = Field(default_factory=dict)
    ffn: dict[str, list[int]] = Field(default_factory=dict)
    edits: list[Edit] = Field(default_factory=list)
    params: int = 0
    budget: int | None = None
    says: str

    def plan(self, init: Literal["first", "middle"] = "first") -> Plan:
        """Return the edits as a plan; a student starts from the `init` block of its interval.

        Raises PpclError where the edits contradict each other; the paper's LP-b does, and is kept as data only.
        """
        edits: list[Edit] = [
            edit.model_copy(update={"init": init}) if isinstance(edit, DepthEdit) else edit for edit in self.edits
        ]
        plan = Plan(edits=edits, params=self.params, reason=[f"{self.name}: {self.says}"])
        try:
            plan.check()
        except PpclError as error:
            raise PpclError(f"{self.name}: data of the paper that is no plan, because {error}") from None
        return plan

    def check(self, gm: GraphModule) -> None:
        """Raise `Refusal` unless a traced model has the blocks that the plan was made for."""
        from ppcl_fx.ir.stacks import stacks

        have = Counter(block.stack for stack in stacks(gm) for block in stack.blocks)
        for path, count in self.blocks.items():
            if have[path] != count:
                other = f"has {have[path]}" if path in have else f"has none, only {', '.join(have)}"
                raise Refusal(
                    f"{self.name}: made for a model with {count} {path}, and this one {other}; "
                    "analyse this model and choose by --analysis"
                )

    def students(self, model: PluggableModel) -> list[str]:
        """Return the ids of the edits to plug: all, or with a `budget` those that `mixtures.swapped_back` leaves."""
        from ppcl_fx.model.mixtures import swapped_back

        if self.budget is not None and self.budget >= model.teacher_params:
            raise Refusal(
                f"{self.name}: {self.budget:,} parameters are to stay, and the whole teacher has "
                f"{model.teacher_params:,}; take the plan that it starts from, or choose by --analysis"
            )
        return model.edits if self.budget is None else list(swapped_back(model, self.budget))


class _File(Record):
    source: str
    plans: dict[str, NamedPlan]


@cache
def _plans() -> dict[str, NamedPlan]:
    return read_json(FILE, _File).plans


def names() -> list[str]:
    return list(_plans())


def named(name: str) -> NamedPlan:
    """Return the plan called `name`. Raises PpclError where there is none; the message has a near match."""
    entries = _plans()
    if name not in entries:
        raise PpclError(f"no plan {name!r}{near(name, entries)}; the plans by name are {', '.join(entries)}")
    own = entries[name]
    base = named(own.extends) if own.extends else own
    edits = [
        *base.edits,
        *(DepthEdit(stack=s, first=a, last=b) for s, spans in own.depth.items() for a, b in spans),
        *(TextStreamEdit(stack=s, source=a, last=b) for s, spans in own.text_stream.items() for a, b in spans),
        *(FfnEdit(stack=s, block=block) for s, blocks in own.ffn.items() for block in blocks),
    ]
    return own.model_copy(update={"name": name, "blocks": own.blocks or base.blocks, "edits": edits})


def is_name(text: str) -> bool:
    """Tell whether what a user gave as a plan is meant as a name and not as a file."""
    return text.startswith(PREFIX) or (":" in text and not Path(text).exists())
