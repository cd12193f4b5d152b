"""PyTorch and an exported file, asked the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.writer import Prepared, floats_as
from ppcl_fx.export.verify.onnx_runner import run
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.tracing import bind, with_rows

Answer = Callable[[dict[str, Any]], torch.Tensor]
"""Gives the output for a call that `Answers.call` made."""


@dataclass(frozen=True)
class Answers:
    """What answers a call of the transformer, once by PyTorch and once by a file.

    Attributes:
        gm: the graph; calls are bound to its inputs.
        dtype: of the floating-point inputs.
        pytorch: the reference.
        exported: the file, in onnxruntime.
    """

    gm: GraphModule
    dtype: torch.dtype
    pytorch: Answer
    exported: Answer

    @classmethod
    def of(cls, prepared: Prepared, running: Any, reference: GraphModule | None = None) -> Answers:
        """Return the answers of a graph and its file.

        Args:
            prepared: the graph.
            running: the file, open.
            reference: the graph in the type in which both answer, where that is not its own: the file is then one
                that was widened to that type.
        """
        gm = reference if reference is not None else prepared.gm
        dtype = main_dtype(gm)

        def pytorch(call: dict[str, Any]) -> torch.Tensor:
            result: torch.Tensor = run_graph(gm, call)[0]
            return result

        def exported(call: dict[str, Any]) -> torch.Tensor:
            if reference is None:
                return run(running, prepared.lowered.feeds(call))
            made = prepared.lowered.feeds(floats_as(call, main_dtype(prepared.gm)))  # position tables in its own type
            return run(running, floats_as(made | {name: call[name] for name in made if name in call}, dtype))

        return cls(prepared.gm, dtype, pytorch, exported)

    def call(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a transformer's keyword arguments by the names of the graph's inputs, floats in `dtype`.

        Raises:
            GuardError: the graph was traced for another kind of call.
        """
        return floats_as(bind(self.gm, with_rows(self.gm, kwargs)), self.dtype)
