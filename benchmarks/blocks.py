"""What each block of a model costs, and what each kind of edit leaves of it: the file that --latency --costs reads.

    python -m benchmarks.blocks shapes
    python -m benchmarks.blocks MODEL --calls RUN/calls --out costs.json

One call runs through the traced teacher and through four rewritten ones (feed-forwards replaced; a long text group;
many short ones; both), each cut into one module a block, with a clock at each cut. They take turns, so that a slow
moment hits all of them. Edits are made at the last blocks of each stack; blocks with the same graph share one median.
So a model of sixty blocks needs six forward passes a repeat, and the memory of one model.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

import ppcl_fx
from benchmarks.clock import RESULTS, parser
from ppcl_fx.calls.store import Calls, map_tensors
from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.ir.executor import moved_to
from ppcl_fx.ir.graphs import module_paths
from ppcl_fx.ir.sites import ffn_sites, text_site
from ppcl_fx.ir.stacks import Block, Stack, stacks
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import SHAPES, open_source
from ppcl_fx.passes.edits.ffn import projector_path
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.report.machine import describe, slug
from ppcl_fx.schema.costs import BlockCost, Costs, StackCost
from ppcl_fx.schema.plan import Edit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace

KINDS = ("whole", "ffn", "text", "text_last", "text_last_ffn")
"""The graphs that are timed, by what they say of a block: the fields of `BlockCost`."""
REST = ""
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""By name: seconds that pass, or seconds of processor time, for one thread on a processor that others use too."""


@dataclass
class Edits:
    """The edits of each kind of graph, and the blocks whose time says something about that kind."""

    edits: dict[str, list[Edit]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    blocks: dict[str, set[str]] = field(default_factory=lambda: {kind: set() for kind in KINDS})


@dataclass
class Timed:
    """One graph, cut: each piece's owner (a block's path, or `REST`), what two blocks must share to cost the same, by
    path, and milliseconds by owner, one entry a run."""

    gm: GraphModule
    owners: list[str]
    shapes: dict[str, tuple[Any, ...]]
    times: dict[str, list[float]] = field(default_factory=dict)


def edits_of(gm: GraphModule, found: Sequence[Stack], span: int) -> Edits:
    """Return what is edited to measure each kind: at the last `span` blocks of each stack, where it is possible."""
    made = Edits()
    for stack in found:
        made.blocks["whole"].update(block.path for block in stack.blocks)
        ffn = [block for block in stack.blocks[-span:] if ffn_sites(gm, block)]
        replaced: list[Edit] = [FfnEdit(stack=block.stack, block=block.index) for block in ffn]
        made.edits["ffn"] += replaced
        made.blocks["ffn"].update(block.path for block in ffn)
        group = stack.blocks[-span - 1 :]
        if len(group) < 2 or not _have_text(gm, group):
            continue
        made.edits["text"].append(_text_edit(group))
        made.blocks["text"].update(block.path for block in group[1:-1])
        pairs = [group[at - 1 : at + 1] for at in range(len(group) - 1, 0, -2)]
        alone: list[Edit] = [_text_edit(pair) for pair in pairs]
        ends = {pair[1].path for pair in pairs}
        made.edits["text_last"] += alone
        made.blocks["text_last"] |= ends
        made.edits["text_last_ffn"] += [*alone, *replaced]
        made.blocks["text_last_ffn"] |= ends & {block.path for block in ffn}
    return made


def _have_text(gm: GraphModule, blocks: Sequence[Block]) -> bool:
    try:
        for block in blocks:
            text_site(gm, block)
    except Refusal:
        return False
    return True


def _text_edit(blocks: Sequence[Block]) -> TextStreamEdit:
    return TextStreamEdit(stack=blocks[0].stack, source=blocks[0].index, last=blocks[-1].index)


def cut(gm: GraphModule, found: Sequence[Stack], edits: Sequence[Edit]) -> Timed:
    """Return the model with `edits` plugged, as one module for each run of nodes of one block or of the rest.

    Args:
        gm: the traced teacher; stays as it is, and its parameters are shared.
        found: its stacks.
        edits: what to plug.
    """
    plan = Plan(edits=list(edits))
    view = plugged(insert_edits(gm, plan), frozenset(plan.ids)) if edits else plugged(gm, frozenset())
    projectors = _projectors(found, edits)
    paths = {block.path for stack in found for block in stack.blocks}
    nodes = [node for node in view.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    owners = _filled([_owner(node, paths, projectors) for node in nodes])
    inside: dict[str, list[Node]] = {path: [] for path in paths}
    part: dict[Node, int] = {}
    pieces: list[str] = []
    for node, owner in zip(nodes, owners, strict=True):
        if not pieces or owner != pieces[-1]:
            pieces.append(owner)
        part[node] = len(pieces) - 1
        if owner != REST:
            inside[owner].append(node)
    shapes = {path: shape_of(path, own) for path, own in inside.items()}
    split = split_module(view, view, lambda node: part[node], keep_original_order=True)
    split.meta = view.meta
    split.eval()
    return Timed(split, pieces, shapes)


def _projectors(found: Sequence[Stack], edits: Sequence[Edit]) -> dict[str, str]:
    """Return the beginning of the paths of each block's projectors -> the block's path."""
    starts: dict[str, str] = {}
    for edit in edits:
        if isinstance(edit, FfnEdit):
            starts[projector_path(edit.id, "")] = f"{edit.stack}.{edit.block}"
        elif isinstance(edit, TextStreamEdit):
            for index in range(edit.source + 1, edit.last + 1):
                path = f"{edit.stack}.{index}"
                starts[projector_path(edit.id, path.replace(".", "_") + ".")] = path
    return starts


def _owner(node: Node, paths: set[str], projectors: Mapping[str, str]) -> str:
    for path in module_paths(node):
        if path in paths:
            return path
        for start, block in projectors.items():
            if path.startswith(start):
                return block
    return REST


def _filled(owners: list[str]) -> list[str]:
    """Give a block everything between its first and its last node."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, owner in enumerate(owners):
        first.setdefault(owner, at)
        last[owner] = at
    filled = list(owners)
    for owner in first:
        if owner == REST:
            continue
        inside = range(first[owner], last[owner] + 1)
        if any(owners[at] not in (owner, REST) for at in inside):
            raise PpclError(f"the nodes of {owner} and of another block are mixed, so neither can be timed alone")
        filled[inside.start : inside.stop] = [owner] * len(inside)
    return filled


def shape_of(path: str, nodes: Sequence[Node]) -> tuple[Any, ...]:
    """Return what two blocks must share to cost the same: operations, their targets and the shapes they give.

    Of the graph that runs: where nothing reads a last block's text, it is shorter than the blocks before it.
    """

    def entry(node: Node) -> tuple[Any, ...]:
        value = node.meta.get("val")
        target = getattr(node.target, "__name__", str(node.target)).removeprefix(f"{path}.")
        shape = (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else None
        return node.op, target, shape

    return tuple(entry(node) for node in nodes)


def run(timed: Timed, kwargs: Mapping[str, Any], device: torch.device, clock: Clock) -> None:
    """Run a call through a cut graph once and keep each owner's milliseconds."""
    spent = dict.fromkeys(timed.owners, 0.0)
    begun = 0.0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal begun
        begun = now(device, clock)

    def end(owner: str, module: nn.Module, args: Any, result: Any) -> None:
        spent[owner] += now(device, clock) - begun

    hooks = []
    for number, owner in enumerate(timed.owners):
        module = timed.gm.get_submodule(f"submod_{number}")
        hooks.append(module.register_forward_pre_hook(begin))
        hooks.append(module.register_forward_hook(lambda *args, owner=owner: end(owner, *args)))
    try:
        timed.gm(**kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for owner, milliseconds in spent.items():
        timed.times.setdefault(owner, []).append(milliseconds)


def now(device: torch.device, clock: Clock) -> float:
    """Return milliseconds of a clock, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() * 1e3


def measure(
    gm: GraphModule,
    call: Mapping[str, Any],
    *,
    repeats: int = 5,
    span: int = 6,
    device: str = "cpu",
    model: str = "",
    clock: Clock = time.perf_counter,
) -> Costs:
    """Return what each part of a traced model costs in one call.

    Args:
        gm: the traced teacher, on `device`.
        call: the call's arguments.
        repeats: timed runs of each graph, after one that is not timed.
        span: at most so many blocks at the end of each stack are edited.
        device: where to compute.
        model: the model's fingerprint.
        clock: gives seconds.
    """
    where = torch.device(device)
    found = stacks(gm)
    made = edits_of(gm, found, span)
    kwargs = {name: moved_to(value, where) for name, value in bind(gm, call).items()}
    graphs = {kind: cut(gm, found, made.edits[kind]) for kind in KINDS if kind == "whole" or made.edits[kind]}
    forward: list[float] = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            begun = now(where, clock)
            gm(**kwargs)
            forward.append(now(where, clock) - begun)
            for timed in graphs.values():
                run(timed, kwargs, where, clock)
    for timed in graphs.values():
        timed.times = {owner: times[1:] for owner, times in timed.times.items()}
    shapes: dict[str, list[int]] = {}
    map_tensors(dict(kwargs), lambda path, tensor: shapes.update({path.lstrip("."): list(tensor.shape)}))
    return Costs(
        model=model,
        inputs=shapes,
        repeats=repeats,
        rest=_median(graphs["whole"].times.get(REST, [0.0])),
        forward=_median(forward[1:]),
        stacks=[_stack_cost(stack, graphs, made) for stack in found],
    )


def _stack_cost(stack: Stack, graphs: Mapping[str, Timed], made: Edits) -> StackCost:
    shapes = graphs["whole"].shapes
    alike: dict[tuple[Any, ...], list[str]] = {}
    for block in stack.blocks:
        alike.setdefault(shapes[block.path], []).append(block.path)

    def cost(block: Block, kind: str) -> float | None:
        if kind not in graphs or (kind.startswith("text") and block is stack.blocks[0]):
            return None  # a stack's first block has no text state to take over
        measured = [path for path in alike[shapes[block.path]] if path in made.blocks[kind]]
        times = [time for path in measured for time in graphs[kind].times.get(path, [])]
        return _median(times) if times else None

    blocks = []
    for block in stack.blocks:
        whole = cost(block, "whole")
        assert whole is not None
        blocks.append(BlockCost(whole=whole, **{kind: cost(block, kind) for kind in KINDS[1:]}))
    return StackCost(path=stack.blocks[0].stack, first=stack.blocks[0].index, blocks=blocks)


def _median(times: Sequence[float]) -> float:
    return round(statistics.median(times), 6)


def opened(name: str, folder: Path | None, number: int) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return a transformer and the arguments of one of its calls.

    Args:
        name: a diffusers folder, a hub id, or ``shapes``.
        folder: recorded calls; without them a pipeline draws one step of one picture.
        number: which of the calls.

    Raises:
        PpclError: there is no such model or call, or the calls are another model's.
    """
    if folder is None:
        pipeline = open_source(name).pipeline()
        calls = ppcl_fx.record(pipeline, ["a red circle"], num_inference_steps=1, seed=0)
        transformer: nn.Module = pipeline.transformer
    else:
        transformer, calls = open_source(name).transformer(), Calls.open(folder)
        if calls.model and calls.model != fingerprint(transformer):
            raise PpclError(f"{folder}: recorded from another model than {name}; record its calls")
    if number not in range(len(calls)):
        raise PpclError(f"--call {number}: there are {len(calls)} calls, from 0; choose one of them")
    return transformer, calls[number].kwargs


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the costs; return the file's path."""
    made = parser(
        "blocks",
        __doc__,
        call=(0, "which of the calls is run"),
        repeats=(15, "timed runs of each graph"),
        span=(6, "blocks a stack that are edited at most"),
        device=("cpu", "where to compute"),
    )
    made.add_argument("model", nargs="?", default=SHAPES, help="a diffusers folder, a hub id, or 'shapes'")
    made.add_argument("--calls", type=Path, default=None, help="recorded calls (default: one is recorded)")
    made.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="'cpu' for one thread on a busy processor (default: wall)"
    )
    options = made.parse_args(arguments)
    if options.clock == "cpu" and (options.device != "cpu" or torch.get_num_threads() > 1):
        made.error("--clock cpu: only on the CPU and with one thread (OMP_NUM_THREADS=1)")
    if options.repeats < 1 or options.span < 1:
        made.error("--repeats and --span are at least 1")
    try:
        transformer, call = opened(options.model, options.calls, options.call)
        mine = fingerprint(transformer)
        gm = trace(transformer, call).to(options.device)
        how = {"repeats": options.repeats, "span": options.span, "device": options.device}
        costs = measure(gm, call, **how, model=mine, clock=CLOCKS[options.clock])
        ran = {"threads": torch.get_num_threads(), "device": _device(options.device), "clock": options.clock}
        ran["dtype"] = str(next(gm.parameters()).dtype)
        machine = {**describe(("torch", "diffusers", "ppcl-fx")), **ran}
        path: Path = options.out or RESULTS / f"{slug()}-blocks.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        costs.model_copy(update={"machine": machine}).save(path)
    except PpclError as error:
        made.exit(2, f"{error}\n")
    _print(costs)
    print(path)
    return path


def _device(name: str) -> str:
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else name


def _print(costs: Costs) -> None:
    for stack in costs.stacks:
        print(f"{stack.path}, ms a block: " + ", ".join(KINDS))
        for index, block in enumerate(stack.blocks, stack.first):
            values = [getattr(block, kind) for kind in KINDS]
            print(f"{index:4}  " + "  ".join("       –" if value is None else f"{value:8.3f}" for value in values))
    print(f"the rest {costs.rest:.3f} ms, the sum {costs.total:.3f} ms, uncut {costs.forward:.3f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
