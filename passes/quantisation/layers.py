"""The linear layers of a graph, and what their inputs look like on recorded calls: ``X^T X`` and the largest value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.partition import Watch
from ppcl_fx.ir.switches import is_switch
from ppcl_fx.passes.calibration.normal_sums import products_of


@dataclass(eq=False)
class LayerInputs:
    """What layers that read the same values were given.

    Attributes:
        layers: their module paths.
        gram: ``X^T X`` over all tokens, ``[columns, columns]``, float32.
        tokens: how many these were.
        largest: the largest absolute value.
    """

    layers: list[str]
    gram: Tensor
    tokens: int = 0
    largest: float = 0.0

    def add(self, value: Tensor) -> None:
        """Add a call's values, ``[..., columns]``."""
        rows = value.detach().reshape(-1, value.shape[-1])
        with products_of(rows.dtype, rows.device):
            self.gram += (rows.mT @ rows).float() if rows.dtype == torch.float32 else rows.float().mT @ rows.float()
        self.tokens += len(rows)
        self.largest = max(self.largest, float(rows.abs().max()))


def linear_layers(gm: GraphModule) -> dict[str, nn.Linear]:
    """Return the linear layers of a graph by module path, those inside of modules that the trace left whole too."""
    return {path: module for path, module in gm.named_modules() if type(module) is nn.Linear}


def layer_weights(gm: GraphModule) -> list[str]:
    """Return the names of the weights of a graph's linear layers."""
    return [f"{path}.weight" for path in linear_layers(gm)]


def layer_inputs(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    residency: Residency,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[LayerInputs]:
    """Run a graph on recorded calls, and give what its linear layers were given, those of one segment after the other.

    Students of a pluggable graph run beside their teacher, each on the teacher's values, as they are distilled: so a
    layer's weights are rounded once for every mixture.

    Args:
        gm: the graph; a pluggable one or that of one model.
        calls: keyword arguments of the calls.
        residency: where weights and values are. One that keeps values between segments needs one block's sums at a
            time.
        report: told how many segments of all are done.
    """
    layers = linear_layers(gm)
    executor = Executor(gm, _ends, residency, partial=True)
    last = {}
    for number, segment in enumerate(executor.segments):
        for name in segment.tensors:
            last[name.rpartition(".")[0]] = number
    sums: dict[str, LayerInputs] = {}
    for sweep in executor.sweeps:
        with ExitStack() as stack:
            watch = _Inputs(layers, sums)
            for path, module in layers.items():
                if last.get(path, -1) >= sweep.start:
                    stack.callback(module.register_forward_pre_hook(watch.of(path)).remove)
            executor.run(sweep, calls)
        done = {path for path, number in last.items() if number < sweep.stop}
        for group in {id(group): group for group in sums.values()}.values():
            if done.issuperset(group.layers):
                yield group
        sums = {path: group for path, group in sums.items() if not done.issuperset(group.layers)}
        report(sweep.stop, len(executor.segments))


class _Inputs:
    """Sums up the inputs of layers; those that are given the same tensor, one after the other, share their sums."""

    def __init__(self, layers: Mapping[str, nn.Linear], sums: dict[str, LayerInputs]) -> None:
        self.layers, self.sums = layers, sums
        self.before: tuple[Tensor, LayerInputs] | None = None

    def of(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return the hook of a layer."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0]
            again = self.before is not None and self.before[0] is value
            if path not in self.sums:
                if again and self.before is not None:
                    self.before[1].layers.append(path)
                    self.sums[path] = self.before[1]
                else:
                    columns = value.shape[-1]
                    self.sums[path] = LayerInputs([path], torch.zeros(columns, columns, device=value.device))
            if not (again and self.before is not None and self.before[1] is self.sums[path]):
                self.sums[path].add(value)
            self.before = (value, self.sums[path])

        return hook


def _ends(gm: GraphModule) -> list[Watch]:
    """Return watches of every student's value and of the result: all that has to run."""
    (output,) = gm.graph.find_nodes(op="output")
    students = [node.args[1] for node in gm.graph.nodes if is_switch(node)]
    wanted = [node for node in (*students, *output.all_input_nodes) if isinstance(node, Node)]
    return [Watch((node,), lambda value: None) for node in dict.fromkeys(wanted)]
