"""What an exported folder must hold to make position tables: configuration, plan and example. No weights, no code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict, JsonValue
from torch.fx import GraphModule

from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.export.onnx.writer import floats_as
from ppcl_fx.export.runtime.sizes_only import SizesOnly
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.files import Sealed, inside, read_json, write_json
from ppcl_fx.ir.graphs import draft
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.passes.lowering.positions import POSITIONS, PositionsAsInputs
from ppcl_fx.passes.lowering.tuples_apart import TuplesApart
from ppcl_fx.schema.plan import Plan, plan_digest
from ppcl_fx.tracing import bind, trace_saved, with_rows
from ppcl_fx.tracing.meta_model import skeleton

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel

HEAD = "head.json"
WHOLE, MOST_TENSORS = 64, 10**6
"""Parameters of the teacher for each byte of an exported ratio, at most; and how many tensors they may be."""
REMEMBERED = 8
"""For how many kinds of call the position tables are kept."""


class Head(Sealed):
    """The model without its weights.

    Attributes:
        config: the transformer's configuration, its class in ``_class_name``.
        example: the arguments it was traced with, as `ppcl_fx.calls.examples.describe` writes them.
        plan: the plan of all its edits.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    kind: Literal["head"] = "head"
    config: dict[str, JsonValue]
    example: dict[str, JsonValue]
    plan: Plan


def write_head(model: PluggableModel, folder: Path) -> bool:
    """Write ``head.json`` beside a model's exported files.

    Args:
        model: the model.
        folder: the folder of the exported files.

    Returns:
        Whether it was written: a model of no class of diffusers cannot be built again from its configuration.
    """
    info = graph_info(model.graph)
    if not info.get("config", {}).get("_class_name"):
        return False
    write_json(folder / HEAD, Head(config=info["config"], example=info["example"], plan=model.plan))
    return True


def read_head(folder: Path) -> Head:
    """Read ``head.json``.

    Raises:
        PpclError: it is missing or damaged.
    """
    if not (folder / HEAD).is_file():
        raise PpclError(
            f"{folder / HEAD}: no such file, and the position tables are made by it; copy it there, or export again "
            "(a transformer of no class of diffusers has none)"
        )
    return read_json(inside(folder, HEAD), Head)


def check_head(head: Head, manifest: Manifest, folder: Path) -> None:
    """Refuse a graph that was exported from another model, or by another plan, than ``head.json``.

    Raises:
        PpclError: it was.
    """
    if manifest.plan is not None and plan_digest(manifest.plan) != plan_digest(head.plan):
        raise PpclError(
            f"{folder / HEAD}: of another model or plan than {manifest.file}; export that ratio again: "
            f"ppcl-fx export STUDENT --keep {manifest.keep:g} -o {folder} --overwrite"
        )


def pluggable_graph(head: Head, dtype: torch.dtype, folder: Path, manifests: Iterable[Manifest]) -> GraphModule:
    """Trace the model again, on the meta device, with all its edits.

    Args:
        head: what `read_head` read.
        dtype: of weights and floating-point inputs.
        folder: where it was read.
        manifests: of the graphs there; the files of their weights bound the model's size.

    Raises:
        PpclError: the class is unknown or refuses the configuration, or the plan does not fit it.
    """
    sizes: dict[str, int] = {}
    for manifest in manifests:
        sizes |= {manifest.file: manifest.size} | {weight.file: weight.size for weight in manifest.weights}
    where, room = str(folder / HEAD), Room(MOST_TENSORS, WHOLE * sum(sizes.values()))
    model = skeleton(diffusers_class(str(head.config.get("_class_name"))), head.config, dtype, room=room, where=where)
    example = build_call(head.example, where=where)
    return insert_edits(trace_saved(model, example.over(floats_as(example, dtype)), folder / HEAD), head.plan)


class Front:
    """What stands before an exported graph: it takes a pipeline's call and gives the graph's inputs.

    Args:
        graph: what `pluggable_graph` made.
        students: the edits plugged.

    Attributes:
        gm: the mixture, on the meta device.
    """

    def __init__(self, graph: GraphModule, students: Sequence[str]) -> None:
        self.gm = plugged(graph, frozenset(students))
        result = Pipeline((TuplesApart(), PositionsAsInputs()))(draft(self.gm))
        if result.refused:
            raise PpclError(f"the model's positions cannot become inputs: {result.refused[0].reason}; export again")
        parted = result.graph_module
        self._maker = SizesOnly(parted) if POSITIONS in parted.meta else None
        self._known: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by the names of the graph's inputs.

        Raises:
            GuardError: the call has an argument that the exported graph does not know, or lacks one.
        """
        named = dict(zip(graph_info(self.gm)["signature"], args, strict=False))
        try:
            return bind(self.gm, with_rows(self.gm, named | dict(kwargs)))
        except GuardError as error:
            reason = str(error).rpartition("; ")[0]
            raise GuardError(
                f"{reason}; for such calls trace the student anew, model.retrace(**call).save(FOLDER), and export that"
            ) from error

    def tables(self, bound: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the position tables of a call by name, on the CPU.

        They follow from numbers and sizes alone, so they are remembered for calls of the same kind.

        Raises:
            GuardError: the positions were traced for another kind of call.
        """
        if self._maker is None:
            return {}
        key = repr([(n, (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v) for n, v in bound.items()])
        if key not in self._known:
            self._known[key] = self._maker.tables(bound)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]
