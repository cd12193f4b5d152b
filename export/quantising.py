"""Weights in few bits for an export: rounded once for all ratios, measured on each, and the reference's too."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.calls.examples import floats_as
from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.export.config import ROUNDED_FOR_CALLS, ExportConfig
from ppcl_fx.export.store.manifest import QuantisedWeights
from ppcl_fx.export.store.weight_source import WeightPiece, WeightSource, weightless
from ppcl_fx.export.verify.metrics import agreement, spread
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.spill import Spill
from ppcl_fx.passes.quantisation.layers import layer_weights, linear_layers
from ppcl_fx.passes.quantisation.linear import with_quantised
from ppcl_fx.passes.quantisation.quantise import Quantised, quantise, within_error
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme

CALLS = 32
"""Recorded calls that weights are rounded for, at most, from the earliest timestep to the latest."""
MEASURED = 8
"""Recorded calls that the added error is measured on, at most."""
INT4_BLOCK = 32
"""Weights of a row that share a scale in INT4, if nothing else is said."""


@dataclass(frozen=True)
class Rounding:
    """Weights in few bits for some graphs of one model.

    Attributes:
        source: all weights, those in few bits among them.
        calls: how many calls they were rounded for.
        added: graph -> the relative error that they add to its output.
    """

    source: WeightSource
    calls: int
    added: dict[GraphModule, float] = field(default_factory=dict)

    def described(self, gm: GraphModule, held: Collection[str], size: int) -> QuantisedWeights:
        """Return what the manifest of a graph says; its file has `size` bytes of weights, those of the names `held`."""
        found = self.source.quantised
        assert found is not None
        pieces = self.source.pieces(gm)
        own = {name: [piece.name for piece in pieces.get(name, ())] for name in layer_weights(gm) if name in held}
        return QuantisedWeights(
            weights=found.scheme.weights,
            block=found.scheme.block,
            layers=sum(names[0] in found for names in own.values() if names),
            kept={name: found.kept[names[0]] for name, names in own.items() if names and names[0] in found.kept},
            calls=self.calls,
            added_error=self.added[gm],
            bytes=size,
        )

    def reference(self, gm: GraphModule, original: GraphModule) -> GraphModule:
        """Return a graph with the quantised weights in it; `original` is the one that it was made from."""
        weights = {}
        pieces = self.source.pieces(original)
        for name in layer_weights(original):
            rows = self.source.quantised_pieces(pieces.get(name, ()))
            if rows is not None:
                weights[name.rpartition(".")[0]] = QuantisedWeight.joined(rows)
        return with_quantised(gm, weights)


@contextmanager
def rounded_weights(
    source: WeightSource, mixtures: Mapping[Path, GraphModule], calls: Calls | None, config: ExportConfig
) -> Iterator[Rounding | None]:
    """Round the weights of a model for as long as graphs of it are written; None where they stay as they are stored.

    The pluggable graph runs once over recorded calls, the teacher and its students each on the teacher's values. What
    waits where weights are on disk lies beside the graphs meanwhile.

    Args:
        source: the model's weights.
        mixtures: the graphs, by the files that they are to be written to.
        calls: recorded calls.
        config: the options.

    Raises:
        PpclError: there are no calls, blocks do not divide a layer's columns, or no layer stays within the error.
    """
    if config.weights == "stored":
        yield None
        return
    if calls is None or not len(calls):
        raise PpclError(f"--weights {config.weights}: {ROUNDED_FOR_CALLS}")
    root, graphs = source.root, list(mixtures.values())
    assert isinstance(root, GraphModule)
    dtype = main_dtype(root)
    scheme = _scheme(config, dtype, root)

    def spread_calls(count: int) -> list[dict[str, Any]]:
        chosen = spread([head.timestep for head in calls.heads()], count)
        return [floats_as(calls[index].kwargs, dtype) for index in chosen]

    first = next(iter(mixtures))
    work = first.with_name(f".{first.stem}.partial-{uuid.uuid4().hex[:8]}") if weightless(root) else None
    some = spread_calls(CALLS)
    try:
        with _residency(source, config, work) as residency:
            found = quantise(root, some, scheme, residency, None if work is None else work / "weights")
        added = _AddedError(source, graphs, spread_calls(MEASURED), config, work)
        if config.weight_error is not None:
            alone = partial(added.alone, found) if work is None else None  # a run for each layer is for memory alone
            found = within_error(found, config.weight_error, lambda some: max(added.of(some)), alone)
            if not found.errors:
                raise PpclError(
                    f"--weight-error {config.weight_error:g}: no layer in {config.weights} stays within it; allow "
                    "more, or choose another --weights or a smaller --block"
                )
        yield Rounding(source.with_quantised(found), len(some), dict(zip(graphs, added.of(found), strict=True)))
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


class _AddedError:
    """The relative error that weights in few bits add to what graphs give on recorded calls."""

    def __init__(
        self,
        source: WeightSource,
        graphs: Sequence[GraphModule],
        calls: Sequence[Mapping[str, Any]],
        config: ExportConfig,
        work: Path | None,
    ) -> None:
        self.source, self.graphs, self.calls = source, graphs, calls
        self._outputs = partial(_outputs, config=config, work=work)
        self._exact = [self._outputs(gm, calls, source) for gm in graphs]
        self._names = [{piece.name for part in source.pieces(gm).values() for piece in part} for gm in graphs]
        self._worst = 0

    def of(self, some: Quantised) -> list[float]:
        """Return the error of each graph, the largest of a call."""
        few = self.source.with_quantised(some)
        given = [self._outputs(gm, self.calls, few) for gm in self.graphs]
        errors = [_errors(*pair) for pair in zip(given, self._exact, strict=True)]
        self._worst = max(range(len(self.calls)), key=lambda call: max(row[call] for row in errors))
        return [max(row) for row in errors]

    def alone(self, found: Quantised, name: str) -> float:
        """Return the error that one layer adds, in the last graph that has it, on the call that `of` found worst."""
        index = max((i for i, names in enumerate(self._names) if name in names), default=None)
        if index is None:
            return 0.0
        call = self._worst
        few = self.source.with_quantised(found.without(found.errors.keys() - {name}, ""))
        given = self._outputs(self.graphs[index], self.calls[call : call + 1], few)
        return _errors(given, self._exact[index][call : call + 1])[0]


def _scheme(config: ExportConfig, dtype: torch.dtype, root: GraphModule) -> Scheme:
    """Return how weights are stored; refuse blocks that were asked for and do not divide some layer's columns."""
    assert config.weights != "stored"
    block = config.block or (INT4_BLOCK if config.weights == "int4" else None)
    scheme = Scheme(config.weights, block, config.torch_dtype or dtype)
    for path, layer in linear_layers(root).items():
        if config.block is not None and layer.in_features % config.block:
            fits = max(size for size in range(1, config.block) if layer.in_features % size == 0)
            raise PpclError(
                f"--block {config.block}: does not divide the {layer.in_features} columns of {path}; give one that "
                f"does, such as {fits}, or leave it out"
            )
    return scheme


@contextmanager
def _residency(source: WeightSource, config: ExportConfig, work: Path | None) -> Iterator[Residency]:
    """Yield a residency for one run of the model: all in memory, or block by block from disk."""
    root = source.root
    assert isinstance(root, GraphModule)
    if work is None:
        yield Residency.of(root)
        return
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        values = Spill(Path(folder), config.memory_limit // 4, torch.device("cpu"))
        yield Residency(values.device, source.read, values, source.release)


def _outputs(
    gm: GraphModule,
    calls: Sequence[Mapping[str, Any]],
    source: WeightSource,
    *,
    config: ExportConfig,
    work: Path | None,
) -> list[Tensor]:
    """Return what a mixture gives on calls with the weights of a source, in few bits or as they were."""
    pieces, found = source.pieces(gm), list[Tensor]()

    def read(name: str) -> Tensor:
        rows = source.quantised_pieces(pieces[name])
        if rows is not None:
            return torch.cat([part.dequantised(part.scheme.scale) for part in rows]).to(gm.get_parameter(name).dtype)
        if work is None:
            raise KeyError(name)  # the graph's own
        return torch.cat([_piece(source, piece) for piece in pieces[name]])

    def keep(call: int, result: Any) -> None:
        if result is not None:
            first = result[0] if isinstance(result, (tuple, list)) else result
            found.append(first.float())

    with ExitStack() as stack:
        for path, layer in linear_layers(gm).items():
            rows = source.quantised_inputs(pieces.get(f"{path}.weight", ()))
            if rows is not None:
                stack.callback(layer.register_forward_pre_hook(partial(_stored, *rows)).remove)
        residency = replace(stack.enter_context(_residency(source, config, work)), read=read)
        executor = Executor(gm, lambda graph: [], residency)
        for sweep in executor.sweeps:
            executor.run(sweep, calls, end=keep)
    return found


def _piece(source: WeightSource, piece: WeightPiece) -> Tensor:
    flat = source.read(piece.name).reshape(-1)
    return flat[piece.first : piece.first + torch.Size(piece.shape).numel()].reshape(piece.shape)


def _stored(scheme: Scheme, scale: float, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (scheme.stored_inputs(args[0], scale), *args[1:])


def _errors(given: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each call's result."""
    return [agreement(one, right, "").relative for one, right in zip(given, exact, strict=True)]
