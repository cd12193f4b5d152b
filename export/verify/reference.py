"""PyTorch and an exported file, asked the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.export.onnx.graph_run import run_graph
from ppcl_fx.export.onnx.writer import Prepared
from ppcl_fx.export.verify.metrics import difference
from ppcl_fx.export.verify.onnx_runner import run
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.tracing import bind, with_rows

Answer = Callable[[dict[str, Any]], torch.Tensor]
"""Gives the output for a call that `Answers.call` made."""


@dataclass(frozen=True)
class Answers:
    """What answers a call of the transformer, once by PyTorch and once by a file.

    Attributes:
        prepared: the graph; calls are bound to its inputs.
        running: the file, in onnxruntime.
        wide: the graph in the type in which both answer, where that is not its own: the file is then one that was
            widened to that type.
    """

    prepared: Prepared
    running: Any
    wide: GraphModule | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the floating-point inputs."""
        return main_dtype(self.wide if self.wide is not None else self.prepared.gm)

    def pytorch(self, call: dict[str, Any]) -> torch.Tensor:
        """Return the reference."""
        result: torch.Tensor = run_graph(self.wide if self.wide is not None else self.prepared.gm, call)[0]
        return result

    def exported(self, call: dict[str, Any]) -> torch.Tensor:
        """Return what the file gives."""
        lowered = self.prepared.lowered
        if self.wide is None:
            return run(self.running, lowered.feeds(call))
        made = lowered.feeds(floats_as(call, main_dtype(self.prepared.gm)))  # position tables in its own type
        return run(self.running, floats_as(made | {name: call[name] for name in made if name in call}, self.dtype))

    def call(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a transformer's keyword arguments by the names of the graph's inputs, floats in `dtype`.

        Raises:
            GuardError: the graph was traced for another kind of call.
        """
        return floats_as(bind(self.prepared.gm, with_rows(self.prepared.gm, kwargs)), self.dtype)

    def differences(self) -> dict[str, float]:
        """Return the largest difference on the calls of every shape, by the shape's name."""
        calls = {name: floats_as(kwargs, self.dtype) for name, kwargs in self.prepared.calls.items()}
        return {name: difference(self.exported(call), self.pytorch(call)) for name, call in calls.items()}

