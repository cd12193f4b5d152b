"""Width edits of the second kind: the text streams of a group of blocks become projectors of an earlier one (Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.sites import TextSite, text_site
from ppcl_fx.ir.stacks import Block
from ppcl_fx.ir.switches import insert_switch, surface, switches
from ppcl_fx.passes.context import Context
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.edits.ffn import add_projector, projector_path
from ppcl_fx.schema.plan import TextStreamEdit


@dataclass(frozen=True)
class TextStream(Pass, name="text-stream", kind="rewrite", numerics="exact"):
    """Put switchable projectors beside the text streams of the blocks after ``source`` up to ``last``.

    ``z_p = z_r + W_z z_r + b_z``, where ``z_r`` is what feeds the text Q, K, V projections of block ``source``
    (projectors do not chain). The text state of ``source`` passes through, and the last block applies
    ``e + W_h e + b_h``. When it is plugged, the text half of the blocks and the attention's text output projection
    have no reader and vanish. Idempotent.
    """

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
        context = Context.of(gm)
        source, blocks = self._blocks(context)
        context.begin()
        origin = text_site(gm, source)
        sites = [text_site(gm, block) for block in blocks]
        if not sites:
            raise Refusal(f"{self.edit.id} has no block left to edit; depth edits replace all of them")
        for site in sites:
            self._replace_z(gm, origin, site)
        for site in sites:
            self._replace_state(gm, source, site, last=site is sites[-1])
        context.keep_stacks()
        return Result(gm, True)

    def _blocks(self, context: Context) -> tuple[Block, list[Block]]:
        """Return the source, and those of the blocks that depth edits left, students for the runs they replace."""
        edit, stack = self.edit.id, self.stack
        source = context.block(edit, stack, self.source)
        context.teacher(edit, stack, self.last)
        spans = [span for span in context.spans if span.stack == stack]
        for span in spans:
            if span.first <= self.source <= span.last:
                raise Refusal(f"{edit}: its source block {self.source} lies in {span.edit}; choose a source outside")
            if span.first <= self.last < span.last:
                raise Refusal(f"{edit}: it ends inside {span.edit}; let it end at {span.first - 1} or {span.last}")
        wanted = range(self.source + 1, self.last + 1)
        left = [i for i in wanted if not any(span.first < i <= span.last for span in spans)]
        return source, [context.block(edit, stack, i) for i in left]

    def _replace_z(self, gm: GraphModule, origin: TextSite, site: TextSite) -> None:
        student = add_projector(gm, self._path(site, "z"), origin.z, site.z)
        insert_switch(site.z, student, self.edit.id, site.block, "z", keep=lambda user: user is not site.attention)

    def _replace_state(self, gm: GraphModule, source: Block, site: TextSite, last: bool) -> None:
        state = surface(source.outputs["text"])
        leaving = surface(site.leaving)
        if last:
            state = add_projector(gm, self._path(site, "state"), state, leaving)
        insert_switch(leaving, state, self.edit.id, site.block, "text")

    def _path(self, site: TextSite, part: str) -> str:
        return projector_path(self.edit.id, f"{site.block.replace('.', '_')}.{part}")
