"""What each edit saves, in parameters: measured on the graph once, then plain sums over a plan's edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import GraphModule, Node

from ppcl_fx.errors import Refusal
from ppcl_fx.ir.graphs import finished
from ppcl_fx.ir.sites import ffn_sites, text_site
from ppcl_fx.ir.stacks import Block, Stack, stacks
from ppcl_fx.passes.edits.plug import edited, plugged
from ppcl_fx.passes.selection.sensitivity import removed_blocks
from ppcl_fx.schema.analysis import BlockSavings, Redundancy, StackAnalysis
from ppcl_fx.schema.plan import Edit, FfnEdit, Plan, TextStreamEdit


def parameters(gm: GraphModule) -> int:
    """Number of parameters of a traced model, each counted once."""
    return sum(parameter.numel() for parameter in gm.parameters())


def block_parameters(gm: GraphModule, block: Block) -> int:
    """Number of parameters below a block's module path."""
    return sum(parameter.numel() for parameter in gm.get_submodule(block.path).parameters())


def block_savings(gm: GraphModule, found: Sequence[Stack]) -> dict[str, list[BlockSavings]]:
    """What width edits save at each block, by stack name: exact, because they are made and their blocks counted.

    Blocks of a stack are alike, so its last two speak for all: one inside, and the last, whose text output nothing may
    read. Three rewrites serve all stacks: feed-forwards, text streams, and both.
    """
    last = [block for stack in found for block in stack.blocks[-2:]]
    ffn = {block.path: sites for block in last if (sites := ffn_sites(gm, block))}
    groups = [group for stack in found if (group := _text_group(gm, stack)) is not None]
    ffn_only = [FfnEdit(stack=block.stack, block=block.index) for block in last if block.path in ffn]
    after_ffn = _block_sizes(gm, ffn_only)
    after_text = _block_sizes(gm, groups)
    after_both = _block_sizes(gm, [*groups, *ffn_only])
    lost = {f"{group.stack}.{i}" for group in groups for i in range(group.source + 1, group.last + 1)}

    def savings(block: Block) -> BlockSavings:
        path, whole = block.path, block_parameters(gm, block)
        values: dict[str, int | None] = {}
        if path in ffn:
            values["ffn"] = whole - after_ffn[path] - sum(_projector(site.before) for site in ffn[path])
        if path in lost:
            one = _projector(block.outputs["text"])
            saving = whole - after_text[path] - one
            values["text"], values["text_last"] = saving, saving - one
            if path in ffn:
                rest = sum(_projector(site.before) for site in ffn[path] if site.stream != "text")
                values["ffn_without_text"] = after_text[path] - after_both[path] - rest
        return BlockSavings(**values)

    def spread(stack: Stack) -> list[BlockSavings]:
        inside, *end = [savings(block) for block in stack.blocks[-2:]]
        # A stack's first block has no text state before it.
        first = BlockSavings(ffn=inside.ffn)
        return [first, *[inside] * (len(stack.blocks) - 1 - len(end)), *end]

    return {stack.name: spread(stack) for stack in found}


def _text_group(gm: GraphModule, stack: Stack) -> TextStreamEdit | None:
    """The text-stream edit of the last two blocks of a stack (or of the last of two); None if refused."""
    blocks = stack.blocks[-3:]
    if len(blocks) < 2:
        return None
    try:
        for block in blocks:
            text_site(gm, block)
    except Refusal:
        return None
    return TextStreamEdit(stack=blocks[0].stack, source=blocks[0].index, last=blocks[-1].index)


def _projector(state: Node) -> int:
    """Parameters of a linear projector of a state ``[batch, tokens, channels]``."""
    width = int(state.meta["val"].shape[-1])
    return width * (width + 1)


def _block_sizes(gm: GraphModule, edits: Sequence[Edit]) -> dict[str, int]:
    """Parameters left below each block's path with `edits` plugged."""
    plan = Plan(edits=list(edits))
    view = plugged(finished(edited(gm, plan)), frozenset(plan.ids)) if edits else gm
    return {block.path: block_parameters(view, block) for stack in stacks(gm) for block in stack.blocks}


def saved(analysis: Redundancy, edits: Iterable[Edit]) -> int:
    """Parameters that `edits` save together, from the analysis alone; edits of other blocks save nothing."""
    edits = list(edits)
    return sum(_stack_saves(stack, [edit for edit in edits if edit.stack == stack.path]) for stack in analysis.stacks)


def _stack_saves(stack: StackAnalysis, edits: Sequence[Edit]) -> int:
    inside = range(stack.first, stack.last + 1)
    gone = removed_blocks(edits, stack.path) & set(inside)
    total = sum(stack.block_params[index - stack.first] for index in gone)
    without_text: set[int] = set()
    for edit in edits:
        if isinstance(edit, TextStreamEdit) and edit.source in inside:
            lost = [index for index in range(edit.source + 1, edit.last + 1) if index not in gone]
            without_text.update(lost)
            for index in lost:
                savings = stack.savings[index - stack.first]
                total += (savings.text_last if index == lost[-1] else savings.text) or 0
    for edit in edits:
        if isinstance(edit, FfnEdit) and edit.block in inside and edit.block not in gone:
            savings = stack.savings[edit.block - stack.first]
            total += (savings.ffn_without_text if edit.block in without_text else savings.ffn) or 0
    return total
