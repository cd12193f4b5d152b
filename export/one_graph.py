"""One graph of a model: lowered, translated, written, compared to PyTorch, and described in its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError
from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.extras import need
from ppcl_fx.export.onnx.graph_run import alike_once
from ppcl_fx.export.onnx.half import HALF, largest_value
from ppcl_fx.export.onnx.segments import Translations
from ppcl_fx.export.onnx.writer import (
    Prepared,
    call_of,
    parameters_in,
    ports,
    prepare,
    save,
    translated,
    weight_bytes,
    weights_in,
)
from ppcl_fx.export.quantising import Rounding, rounded_weights
from ppcl_fx.export.store.manifest import HalfPrecision, Manifest, WeightFile
from ppcl_fx.export.store.names import manifest_path, typed_graph_path
from ppcl_fx.export.store.publish import beside, publish
from ppcl_fx.export.store.weight_source import Opened, WeightSource, weightless
from ppcl_fx.export.store.weight_store import Store, drop_unused, stored, weights_of
from ppcl_fx.export.verify.gate import gated
from ppcl_fx.export.verify.integrity import sample_of
from ppcl_fx.export.verify.metrics import Gate
from ppcl_fx.export.verify.onnx_runner import latency
from ppcl_fx.export.verify.twin import compare, rounding
from ppcl_fx.io.files import sha256_of
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.graphs import parameter_count
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.retrace import with_weights
from ppcl_fx.passes.lowering.expand import traced_once

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.export.onnx.dynamic_axes import Axis
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.schema.plan import Plan


STEPS = 4
"""Steps of the work on one graph: preparing, translating, checking, timing."""


@dataclass(frozen=True)
class Exported:
    """One exported ratio: what its `Manifest` says of it, and what that does not hold.

    Attributes:
        onnx: the graph; the manifest beside it says how it was made and where its weights are.
        seconds: what the export took.
        engine: the TensorRT engine, where one was built.
    """

    keep: float
    onnx: Path
    params: int
    students: tuple[str, ...]
    opset: int
    parity: dict[str, float]
    parity_max_abs: float | None
    latency_ms: float | None
    seconds: float
    unchecked: str | None = None
    engine: Path | None = None
    gate: Gate | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        plain = asdict(self)
        gate = None if self.gate is None else self.gate.model_dump(mode="json")
        return plain | {"onnx": str(self.onnx), "engine": str(self.engine) if self.engine else None, "gate": gate}


@dataclass(frozen=True)
class ExportedMixture:
    """A graph to export, and where to.

    Attributes:
        gm: the graph.
        typed: the graph in the type that it is exported in, without weights; None where that is the graph's own.
        largest: the largest value of one in float16.
    """

    gm: GraphModule
    keep: float
    students: tuple[str, ...]
    path: Path
    finetuned: bool = False
    typed: GraphModule | None = None
    largest: float | None = None

    def ready(self) -> GraphModule:
        """Return the graph in its type, with its weights on the CPU; without where they were not read."""
        if weightless(self.gm):
            return self.gm if self.typed is None else self.typed
        if self.typed is None and all(p.device.type == "cpu" for p in self.gm.parameters()):
            return self.gm
        return with_weights(self.gm if self.typed is None else self.typed, self.gm)

    def measured(self, calls: Calls | None, unchecked: str | None) -> ExportedMixture:
        """Return the same with its largest value, as `largest_value` finds it before anything is written."""
        if main_dtype(self.gm if self.typed is None else self.typed) != torch.float16:
            return self
        return replace(self, largest=largest_value(self.ready(), calls, unchecked))


@dataclass(frozen=True)
class Job:
    """What is asked of an export.

    Attributes:
        config: the options.
        known: translations of look-alike blocks, used again and added to.
        calls: recorded calls.
        sampling: a sampling run to compare.
        note: told in one line each what was copied.
        step: called after each of the `STEPS` steps of a graph.
    """

    config: ExportConfig
    known: Translations
    calls: Calls | None = None
    sampling: SamplingRun | None = None
    note: Callable[[str], None] = lambda line: None
    step: Callable[[], None] = lambda: None


@dataclass
class GraphExport:
    """What the graphs of one export share. Without a store each file holds its weights.

    Attributes:
        unchecked: why they cannot be compared to PyTorch; None where they can.
        axes: sizes that may change, where they are known already.
    """

    job: Job
    weights: WeightSource
    store: Store | None = None
    plan: Plan | None = None
    unchecked: str | None = None
    axes: Sequence[Axis] | None = None
    rounding: Rounding | None = None

    def export(self, mixture: ExportedMixture) -> Exported:
        """Export one graph."""
        from ppcl_fx.export.onnx.assemble import initializers

        started = time.perf_counter()
        gm = mixture.ready()
        prepared = prepare(gm, *call_of(gm, self.job.calls), found=self.axes)
        self.axes = prepared.axes
        self.job.step()
        final, embed = mixture.path, self.store is None
        own = embed and not weightless(gm) and self.rounding is None  # the graph holds its weights
        initial = None if own else initializers(self.weights, self.weights.pieces(mixture.gm), self.store)
        made = translated(prepared, self.job.known, initial, self.job.config.attention)
        few = None
        if self.rounding is not None:
            few = self.rounding.described(mixture.gm, weights_in(made), weight_bytes(made))
            if self.unchecked is None:
                prepared = replace(prepared, gm=self.rounding.reference(prepared.gm, mixture.gm))
        with beside(final, embed=embed) as path:
            data = save(made, path, embed=embed)
            self.job.step()
            checked = self._checked(prepared, path, mixture)
            card = Manifest(
                **_described(prepared, made),
                file=final.name,
                sha256=sha256_of(path),
                size=path.stat().st_size,
                weights=self._files(made, data),
                keep=mixture.keep,
                params=parameter_count(mixture.gm),
                students=list(mixture.students),
                finetuned=mixture.finetuned,
                plan=self.plan,
                tolerance=self.job.config.tolerance,
                quantised=few,
                **checked,
            )
            publish(path, data, card, final)
        self.job.step()
        told = ("keep", "params", "opset", "parity", "parity_max_abs", "latency_ms", "unchecked", "gate")
        plain: dict[str, Any] = {name: getattr(card, name) for name in told}
        return Exported(onnx=final, students=mixture.students, seconds=time.perf_counter() - started, **plain)

    def _checked(self, prepared: Prepared, path: Path, mixture: ExportedMixture) -> dict[str, Any]:
        """Compare to PyTorch and time; or say why not. Returns the fields of the manifest about it."""
        parity: dict[str, float] = {}
        found: dict[str, Any] = {"unchecked": self.unchecked, "latency_ms": None}
        if self.unchecked is not None:
            found["gate"] = Gate(not_checked=[self.unchecked])
            self.job.step()
        else:
            half = main_dtype(prepared.gm) in HALF
            parity, answers = compare(prepared, path)
            _check(parity, self.job.config.tolerance, mixture.path)
            found["gate"] = gated(answers, self.job.calls, mixture.path, self.job.config, self.job.sampling)
            self.job.step()
            if half:
                found["half"] = HalfPrecision(rounding=rounding(answers), largest_value=mixture.largest)
            else:
                feeds = prepared.lowered.feeds(prepared.calls["traced"])
                found["latency_ms"] = latency(answers.running, feeds, self.job.config.runs)
        return found | {"parity": parity, "parity_max_abs": max(parity.values(), default=None)}

    def _files(self, made: Any, data: Path | None) -> list[WeightFile]:
        from ppcl_fx.export.onnx.assemble import weight_files

        if data is not None:
            size = data.stat().st_size
            return [WeightFile(file=data.name, sha256=sha256_of(data), size=size, sample=sample_of(data))]
        return [self.store.described(name) for name in weight_files(made)] if self.store is not None else []


def write_graphs(
    opened: Opened,
    mixtures: Sequence[ExportedMixture],
    folder: Path,
    job: Job,
    *,
    axes: Sequence[Axis] | None = None,
    written: Callable[[], object] = lambda: None,
) -> list[Exported]:
    """Write a graph for each mixture of a model, in place of what is there, over one copy of the weights.

    Args:
        opened: the model.
        mixtures: what to write.
        folder: where the graphs lie; held by the caller (`ppcl_fx.export.store.publish`).
        job: what is asked.
        axes: sizes that may change, where they are known already.
        written: called after each mixture that is there.
    """
    # Before anything is written.
    mixtures = [mixture.measured(job.calls, opened.unchecked) for mixture in mixtures]
    replaced = [manifest_path(mixture.path).name for mixture in mixtures]
    typed = [manifest_path(typed_graph_path(mixture.path)).name for mixture in mixtures]
    former = weights_of(folder, [*replaced, *typed])
    graphs = {mixture.path: mixture.gm for mixture in mixtures}
    with ExitStack() as stack:
        few = stack.enter_context(rounded_weights(opened.weights, graphs, job.calls, job.config))
        weights = opened.weights if few is None else few.source
        used = {p.name for m in mixtures for pieces in weights.pieces(m.gm).values() for p in pieces}
        needed = {name for one in used for name in weights.stored_as(one)}
        store = None
        if not job.config.embed:
            store = stack.enter_context(stored(weights, needed, folder, replaced, job.note))
        stack.enter_context(alike_once())
        stack.enter_context(traced_once())
        work = GraphExport(job, weights, store, opened.model.plan, opened.unchecked, axes, few)
        results = []
        for mixture in mixtures:
            results.append(work.export(mixture))
            written()
    drop_unused(folder, former)
    return results


def _check(parity: dict[str, float], tolerance: float, final: Path) -> None:
    worst = max(parity, key=lambda name: parity[name])
    if not parity[worst] <= tolerance:
        raise PpclError(
            f"{final}: the exported file differs from PyTorch by {parity[worst]:.2g} at the shape {worst!r}, more "
            f"than {tolerance:g}; nothing was kept; allow more with tolerance, or report the model"
        )


def _described(prepared: Prepared, written: Any) -> dict[str, Any]:
    """Return the fields of a manifest that the file itself tells."""
    gm = prepared.lowered.graph
    versions = {name: str(need(name).__version__) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
    tensors = {name for name, value in prepared.calls["traced"].items() if isinstance(value, torch.Tensor)}
    passes = [str(record["name"]) for record in graph_info(gm).get("passes", [])]
    return {
        "dtype": str(main_dtype(gm)).removeprefix("torch."),
        "params_in_file": parameters_in(written, gm),
        "opset": written.graph.opset_imports[""],
        "inputs": ports(written.graph.inputs),
        "outputs": ports(written.graph.outputs),
        "positions": [name for name in prepared.lowered.inputs if name not in tensors],
        "made": {"ppcl_fx": __version__, **versions, "passes": passes},
    }
