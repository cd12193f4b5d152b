"""Width edits of the second kind: the text streams of a group of blocks become projectors of an earlier one (Eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.ffn import add_projector, projector_path
from ppcl_fx.passes.liveness import mark
from ppcl_fx.passes.switches import insert_switch, surface, switches
from ppcl_fx.plan import TextStreamEdit
from ppcl_fx.sites import TextSite, text_site
from ppcl_fx.stacks import Block, stacks


@dataclass(frozen=True)
class TextStream(Pass):
    """Put switchable projectors beside the text streams of the blocks after ``source`` up to ``last``.

    ``z_p = z_r + W_z z_r + b_z``, where ``z_r`` is what feeds the text Q, K, V projections of block ``source``
    (projectors do not chain). The text state of ``source`` passes through, and the last block applies
    ``e + W_h e + b_h``. When it is plugged, the text half of the blocks and the attention's text output projection
    have no reader and vanish. Idempotent.
    """

    name: ClassVar[str] = "text-stream"
    stack: str
    source: int
    last: int

    @property
    def edit(self) -> TextStreamEdit:
        """The plan's line for this pass."""
        return TextStreamEdit(stack=self.stack, source=self.source, last=self.last)

    def apply(self, gm: GraphModule) -> Result:
        if switches(gm, self.edit.id):
            return Result(gm, False)
        at = {b.index: b for s in stacks(gm) for b in s.blocks if b.stack == self.stack}
        wanted = range(self.source, self.last + 1)
        missing = [i for i in wanted if i not in at]
        if missing:
            raise Refusal(f"the model has no block {self.stack}.{missing[0]}; see ppcl_fx.stacks for those it has")
        return self.insert(gm, at[self.source], [at[i] for i in wanted[1:]])

    def insert(self, gm: GraphModule, source: Block, blocks: Sequence[Block]) -> Result:
        """Do the edit for blocks that are known already; student blocks stand in for the runs they replace."""
        mark(gm)
        origin = text_site(gm, source)
        sites = [text_site(gm, block) for block in blocks]
        if not sites:
            raise Refusal(f"{self.edit.id} has no block left to edit; depth edits replace all of them")
        for site in sites:
            self._replace_z(gm, origin, site)
        for site in sites:
            self._replace_state(gm, source, site, last=site is sites[-1])
        return Result(gm, True)

    def _replace_z(self, gm: GraphModule, origin: TextSite, site: TextSite) -> None:
        path = projector_path(self.edit.id, f"{_key(site.block)}.z")
        student = add_projector(gm, path, origin.z, site.z)
        insert_switch(
            site.z, student, self.edit.id, site.block, "z", keep=lambda user: user is not site.attention
        )

    def _replace_state(self, gm: GraphModule, source: Block, site: TextSite, last: bool) -> None:
        state = surface(source.outputs["text"])
        leaving = surface(site.leaving)
        if last:
            state = add_projector(gm, projector_path(self.edit.id, f"{_key(site.block)}.state"), state, leaving)
        insert_switch(leaving, state, self.edit.id, site.block, "text")


def _key(path: str) -> str:
    return path.replace(".", "_")
