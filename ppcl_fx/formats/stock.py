"""A depth-pruned model as a plain diffusers folder: the same class with fewer blocks, loaded without this package.

Which entry of a class's configuration counts its blocks is found out by trying, and the class is trusted only when its
graph with fewer blocks is the pruned model's.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import PpclError
from ppcl_fx.formats import pruned
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.ir.graphs import ancestors, attribute, draft, finished
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.passes.edits.plug import Plug
from ppcl_fx.schema.plan import DepthEdit
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.guards import is_guard
from ppcl_fx.tracing.meta_model import skeleton as weightless

MOST_TRIES = 64
"""Configurations that are tried before a class is given up."""
_NONE = ", so there is no diffusers folder for this model; save the pluggable model"


def save_stock(model: PluggableModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the mixture that is plugged now as a diffusers folder, with its plan in ``pruned.json``.

    PpclError where another than a depth edit is plugged, the class cannot have fewer blocks or computes something else
    with them, the folder cannot be written, or exists (with `overwrite`: holds something else).
    """
    info = graph_info(model.graph)
    config = info.get("config", {})
    if not config.get("_class_name"):
        raise PpclError("the teacher has no diffusers configuration, so there is no diffusers folder for it")
    plan = pruned.plugged_plan(model)
    width = next((edit.id for edit in plan.edits if not isinstance(edit, DepthEdit)), None)
    if width is not None:
        why = f"{width} is plugged, and no class of diffusers has such a part"
        raise PpclError(f"{why}; plug depth edits alone, or write the released layout")
    kept = pruned.kept_blocks(info["blocks"], plan.depth())
    kind = diffusers_class(config["_class_name"])
    skeleton, found, tensors = _fitting(kind, config, kept, model)
    paths = pruned.renumbered(info["blocks"], kept)
    try:
        shorter = trace(skeleton, build_call(info["example"]))
    except (PpclError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"does not work with fewer blocks ({' '.join(str(error).split())[:200]})"
        raise PpclError(f"{kind.__name__} {why}{_NONE}") from error
    whole = draft(model.graph)  # with whole layers: those rows too that a class computes and does not read
    Plug(frozenset(model.students)).apply(whole)
    apart = difference(finished(whole), shorter, lambda path: pruned.translated(path, paths))
    if apart:
        why = f"{kind.__name__} with fewer blocks computes something else than the pruned model (at {apart})"
        raise PpclError(f"{why}, so a diffusers folder would be wrong; save the pluggable model")
    found["_class_name"] = config["_class_name"]
    return pruned.write_pruned(model, kept, found, tensors, Path(folder), overwrite)


def _fitting(
    kind: type[nn.Module], config: Mapping[str, Any], kept: Mapping[str, Sequence[pruned.Kept]], model: PluggableModel
) -> tuple[nn.Module, dict[str, Any], dict[str, torch.Tensor]]:
    """Return the class without weights, its configuration, and the weights of the blocks that are left by its names."""
    back = pruned.originals(kept)
    held = {**graph_info(model.graph)["unused"], **model.graph.state_dict()}
    apart = "no entry of its configuration counts the blocks"
    for tried in itertools.islice(_configurations(config, kept), MOST_TRIES):
        try:
            skeleton = weightless(kind, tried, model.dtype)
        except PpclError:
            continue
        lists = {stack: skeleton.get_submodule(stack) for stack in kept}
        if any(not isinstance(li, nn.ModuleList) or len(li) != len(kept[stack]) for stack, li in lists.items()):
            continue
        wanted = {name: (pruned.translated(name, back), tensor.shape) for name, tensor in skeleton.state_dict().items()}
        odd = sorted(n for n, (source, shape) in wanted.items() if source not in held or held[source].shape != shape)
        if not odd:
            return skeleton, tried, {name: held[source] for name, (source, _) in wanted.items()}
        apart = f"its parameters differ then, {odd[0]} for one"
    raise PpclError(f"{kind.__name__} cannot be built with the blocks that are left ({apart}){_NONE}")


def _configurations(config: Mapping[str, Any], kept: Mapping[str, Sequence[pruned.Kept]]) -> Iterator[dict[str, Any]]:
    """Give configurations that may build a model with the blocks that are left, the plainest first.

    The length of each shortened block list may be any entry with that number. Lists of whole numbers may name blocks:
    they are tried as they are, and with the new numbers of the blocks that are left.
    """
    shorter = {stack: blocks for stack, blocks in kept.items() if blocks[-1].last + 1 != len(blocks)}
    counters = [
        [(name, len(blocks)) for name, value in config.items() if type(value) is int and value == blocks[-1].last + 1]
        for blocks in shorter.values()
    ]
    lists = [name for name, value in config.items() if _may_name_blocks(value)]
    for chosen in itertools.product(*counters):
        if len({name for name, _ in chosen}) < len(chosen):
            continue
        for blocks in shorter.values() or [()]:
            number = {block.index: place for place, block in enumerate(blocks)}
            for count in range(len(lists) + 1):
                for named in itertools.combinations(lists, count):
                    anew = {name: [number[i] for i in config[name] if i in number] for name in named}
                    yield {**config, **dict(chosen), **anew}


def _may_name_blocks(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
        return False
    return 0 < len(value) == len(set(value))


def difference(one: GraphModule, two: GraphModule, rename: Callable[[str], str]) -> str:
    """Say where two graphs compute something different; an empty string where they do the same operations.

    Each value is described by what it is computed with and from, down to the inputs and parameters (`rename` gives a
    path in `one` its path in `two`), so the order in which a graph lists its nodes does not count. Operations with
    effects are compared in their order as well. Guards are left out: they compute nothing.
    """
    mine, other = _values(one, rename), _values(two, lambda path: path)
    if mine[one.graph.output_node()] == other[two.graph.output_node()] and _effects(one, mine) == _effects(two, other):
        return ""
    have, live = set(other.values()), ancestors([one.graph.output_node()])
    for node in one.graph.nodes:
        if node in live and mine[node] not in have:
            return f"{node.format_node() or node.name}"
    return "the order of operations with effects"


def _values(gm: GraphModule, rename: Callable[[str], str]) -> dict[Node, str]:
    """Return a hash of what each node computes."""
    found: dict[Node, str] = {}
    for node in gm.graph.nodes:
        if not is_guard(node):
            parts = (node.op, _target(gm, node, rename), _plain(node.args, found), _plain(node.kwargs, found))
            found[node] = hashlib.sha256(repr(parts).encode()).hexdigest()
    return found


def _effects(gm: GraphModule, values: dict[Node, str]) -> list[str]:
    computed = (node for node in gm.graph.nodes if node.op in ("call_function", "call_method", "get_attr"))
    return [values[node] for node in computed if not is_guard(node) and node.is_impure()]


def _target(gm: GraphModule, node: Node, rename: Callable[[str], str]) -> str:
    if node.op == "call_module":
        return f"{rename(str(node.target))} {gm.get_submodule(str(node.target))!r}"
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            # A constant has whatever name the tracer gave it.
            return str(tuple(value.shape)) if value.is_meta else tensor_digest(value)
        return rename(str(node.target))
    if callable(node.target):
        return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
    return str(node.target)


def _plain(argument: Any, values: dict[Node, str]) -> object:
    """Return an argument with nodes replaced by their hashes, as something whose `repr` says all."""
    told = map_arg(argument, values.__getitem__)
    return map_aggregate(told, lambda item: "device" if isinstance(item, torch.device) else item)
