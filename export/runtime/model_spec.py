"""The model spec: what an exported folder must hold to make position tables. No weights, no code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue
from torch.fx import GraphModule

from ppcl_fx.calls.examples import build_call, floats_as
from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.files import Record, Sealed, inside, read_json, write_json
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.schema.plan import Plan, plan_digest
from ppcl_fx.tracing import trace_saved
from ppcl_fx.tracing.meta_model import skeleton

MODEL_SPEC = "head.json"
WHOLE, MOST_TENSORS = 64, 10**6
"""Parameters of the teacher for each byte of an exported ratio, at most; and how many tensors they may be."""


class ModelSpec(Record, Sealed):
    """The model without its weights, as ``head.json`` has it.

    Attributes:
        config: the transformer's configuration, its class in ``_class_name``.
        example: the arguments it was traced with, as `ppcl_fx.calls.examples.describe` writes them.
        plan: the plan of all its edits.
    """

    version: Literal[1] = 1
    kind: Literal["head"] = "head"
    config: dict[str, JsonValue]
    example: dict[str, JsonValue]
    plan: Plan


def write_model_spec(model: PluggableModel, folder: Path) -> None:
    """Write ``head.json`` to an exported folder; a model of no class of diffusers, which nobody can build, has none."""
    info = graph_info(model.graph)
    if info.get("config", {}).get("_class_name"):
        write_json(folder / MODEL_SPEC, ModelSpec(config=info["config"], example=info["example"], plan=model.plan))


def read_model_spec(folder: Path) -> ModelSpec:
    """Read ``head.json``; `PpclError` where it is missing or damaged."""
    if not (folder / MODEL_SPEC).is_file():
        raise PpclError(
            f"{folder / MODEL_SPEC}: no such file, and the position tables are made by it; copy it there, or export "
            "again (a transformer of no class of diffusers has none)"
        )
    return read_json(inside(folder, MODEL_SPEC), ModelSpec)


def check_model_spec(spec: ModelSpec, manifest: Manifest, folder: Path) -> None:
    """Raise `PpclError` where a graph was exported from another model, or by another plan, than ``head.json``."""
    if manifest.plan is not None and plan_digest(manifest.plan) != plan_digest(spec.plan):
        raise PpclError(
            f"{folder / MODEL_SPEC}: of another model or plan than {manifest.file}; export that ratio again: "
            f"ppcl-fx export STUDENT --keep {manifest.keep:g} -o {folder} --overwrite"
        )


def pluggable_graph(spec: ModelSpec, dtype: torch.dtype, folder: Path, manifests: Iterable[Manifest]) -> GraphModule:
    """Trace the model again, on the meta device, with all its edits; weights and floating-point inputs are of `dtype`.

    The files that the manifests in its folder name bound the model's size.
    """
    sizes: dict[str, int] = {}
    for manifest in manifests:
        sizes |= {manifest.file: manifest.size} | {weight.file: weight.size for weight in manifest.weights}
    where, room = str(folder / MODEL_SPEC), Room(MOST_TENSORS, WHOLE * sum(sizes.values()))
    model = skeleton(diffusers_class(str(spec.config.get("_class_name"))), spec.config, dtype, room=room, where=where)
    example = build_call(spec.example, where=where)
    return insert_edits(trace_saved(model, example.over(floats_as(example, dtype)), folder / MODEL_SPEC), spec.plan)
