"""Quantisation of a model's linear layers: every layer rounded for its own inputs, and those chosen that bear it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.executor import Residency
from ppcl_fx.passes.quantisation.gptq import output_error, rounded
from ppcl_fx.passes.quantisation.layers import layer_inputs, linear_layers
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme
from ppcl_fx.passes.quantisation.shelf import Shelf


@dataclass(frozen=True)
class Quantised:
    """A model's weights in few bits, by parameter name.

    Attributes:
        weights: of every layer that was rounded.
        errors: of those that are used: the relative error of the layer's output on the calls.
        inputs: of those whose inputs are stored too: their scale.
        kept: of the other layers: why they stay as they are.
    """

    weights: Shelf
    errors: dict[str, float]
    kept: dict[str, str]
    inputs: dict[str, float]

    @property
    def scheme(self) -> Scheme:
        """How the weights are stored."""
        return self.weights.scheme

    def __contains__(self, name: str) -> bool:
        return name in self.errors

    def __getitem__(self, name: str) -> QuantisedWeight:
        if name not in self.errors:
            raise KeyError(name)
        return self.weights[name]

    def without(self, names: Iterable[str], why: str) -> Quantised:
        """Return it with some layers left as they are."""
        left = set(names)
        errors = {name: error for name, error in self.errors.items() if name not in left}
        return replace(self, errors=errors, kept=self.kept | dict.fromkeys(sorted(left), why))


def quantise(
    gm: GraphModule,
    calls: Iterable[Mapping[str, Any]],
    scheme: Scheme,
    residency: Residency | None = None,
    folder: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Quantised:
    """Round the weights of every linear layer of a graph, each for the inputs that it has on recorded calls.

    A layer stays as it is where blocks do not divide its columns, it computes in another type than the model, or no
    call runs it.

    Args:
        gm: the graph, a pluggable one or that of one model; stays as it is.
        calls: keyword arguments of the calls.
        scheme: how to store a weight.
        residency: where weights and values are; all in memory if left out.
        folder: where the rounded weights wait, as for `Shelf`.
        report: told how far it is.
    """
    residency = residency or Residency.of(gm)
    layers, found = linear_layers(gm), Quantised(Shelf(scheme, folder), {}, {}, {})
    main = main_dtype(gm)
    for path, layer in layers.items():
        if not scheme.fits(layer.in_features):
            found.kept[f"{path}.weight"] = f"its {layer.in_features} columns are no whole number of blocks"
        elif layer.weight.dtype != main:
            found.kept[f"{path}.weight"] = f"it computes in another type than the model, {layer.weight.dtype}"
    for group in layer_inputs(gm, calls, residency, report):
        for path in group.layers:
            name = f"{path}.weight"
            if name in found.kept:
                continue
            weight = (layers[path].weight if residency.read is None else residency.read(name)).detach()
            made = rounded(weight, scheme, group.gram, scheme.input_scale(group.largest))
            if made.inputs is not None:
                found.inputs[name] = made.inputs
            found.weights.put(name, made)
            found.errors[name] = output_error(weight, made, group.gram)
    unseen = {f"{path}.weight" for path in layers} - found.errors.keys() - found.kept.keys()
    found.kept.update(dict.fromkeys(sorted(unseen), "no recorded call runs it"))
    return found


def within_error(
    found: Quantised,
    limit: float,
    error: Callable[[Quantised], float],
    alone: Callable[[str], float] | None = None,
) -> Quantised:
    """Return as many quantised layers as a budget of error allows, those of the least effect first.

    Args:
        found: every layer.
        limit: the largest error of the model's output.
        error: measures that error with some layers quantised; it is 0 with none.
        alone: measures it with one layer quantised; if left out the error of the layer's own output stands for it,
            which does not know how much of that reaches the model's.
    """
    if error(found) <= limit:
        return found
    effects = dict(found.errors) if alone is None else {name: alone(name) for name in found.errors}
    order = sorted(effects, key=lambda name: (effects[name], name))
    low, high = 0, len(order)  # `low` layers fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(found.without(order[middle:], "")) <= limit else (low, middle)
    if not any(effects[name] for name in order[:low]):
        low = 0  # none but layers whose results nobody reads
    return found.without(order[low:], f"with it the model's output would be off by more than {limit:g}")
