"""The columns of the types: does a class leave PyTorch in a type, as a file that computes what the model computes?"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export import ExportConfig, export_graph
from ppcl_fx.export.onnx.writer import in_type
from ppcl_fx.model.retrace import with_weights
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import trace
from tests.coverage.case import Case, Kwargs

TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = {name: dtype for name, dtype in TYPES.items() if dtype != torch.float32}
YES = "yes"

Exports = Mapping[str, Mapping[str, str]]
"""For each row of the table what became of its export in each type."""


def calls_of(kwargs: Kwargs) -> Calls:
    """Return one recorded call."""
    return Calls([Call(kwargs=kwargs, prompts=("a", "b"), timestep=0.5, index=0, batch=2)])


def exported(case: Case, name: str) -> str:
    """Export a row's model, loaded in float32, in a type: `YES`, or why it cannot be."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        kwargs = case.kwargs()
        config = ExportConfig(dtype=name, runs=1)  # type: ignore[arg-type]
        try:
            export_graph(trace(case.build(), kwargs), Path(folder) / "one.onnx", config, calls=calls_of(kwargs))
        except PpclError as error:
            return reason(str(error), folder)
    return YES


def reason(line: str, folder: str) -> str:
    """Return the first clause of an error without paths, fit for a cell."""
    words = line.replace(folder, "").removeprefix("/one.onnx: ").partition("; ")[0]
    return " ".join(words.replace("|", "/").split())[:160].strip()


def loaded_in(case: Case, dtype: torch.dtype) -> nn.Module:
    """Return a row's model, saved in float32 and loaded in a type."""
    model = case.build()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        kind = type(model)
        loaded: nn.Module = kind.from_pretrained(folder, torch_dtype=dtype).eval()  # type: ignore[attr-defined]
    return loaded


def typed(case: Case, dtype: torch.dtype) -> GraphModule:
    """Return the graph that is exported in a type of a row's model, which is in float32."""
    kwargs = case.kwargs()
    gm = trace(case.build(), kwargs)
    fresh = in_type(gm, Plan(), dtype, calls_of(kwargs))
    assert fresh is not None
    return with_weights(fresh, gm)


def read(page: Path) -> dict[str, dict[str, str]]:
    """Return what a page says of the types."""
    rows = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    cells = {row[0].replace("`", "", 2): row[-len(TYPES) :] for row in rows}
    return {name: dict(zip(TYPES, found, strict=True)) for name, found in cells.items()}
