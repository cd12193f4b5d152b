"""One graph of a model: lowered, translated, written, compared to PyTorch, and described in its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from ppcl_fx.export.onnx.half import HALF, compare_in_float32, largest_value, rounding
from ppcl_fx.export.onnx.inputs import in_type
from ppcl_fx.export.onnx.writer import Prepared, compare, parameters_in, ports, prepare, save, translated
from ppcl_fx.export.store.manifest import HalfPrecision, Manifest, WeightFile
from ppcl_fx.export.store.names import manifest_path, typed_graph_path
from ppcl_fx.export.store.publish import beside, publish
from ppcl_fx.export.store.weight_source import Opened, WeightSource, weightless
from ppcl_fx.export.store.weight_store import Store, drop_unused, stored, weights_of
from ppcl_fx.export.verify.gate import gated
from ppcl_fx.export.verify.integrity import sample_of
from ppcl_fx.export.verify.metrics import Gate
from ppcl_fx.export.verify.onnx_runner import latency
from ppcl_fx.export.verify.reference import Answers
from ppcl_fx.io.files import sha256_of
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.graphs import parameter_count
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.passes.lowering.expand import traced_once

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.export.onnx.assemble import Initial, Translations
    from ppcl_fx.export.onnx.dynamic_axes import Axis
    from ppcl_fx.export.verify.sampling import SamplingRun
    from ppcl_fx.schema.plan import Plan


STEPS = 4
"""Steps of the work on one graph: preparing, translating, checking, timing."""


@dataclass(frozen=True)
class Exported:
    """One exported ratio.

    Attributes:
        keep: the share asked for.
        onnx: the graph; the manifest beside it says how it was made and where its weights are.
        params: parameters of the mixture, as the plan counts them.
        students: ids of the edits plugged.
        opset: version of the ONNX operators.
        parity: the largest difference to PyTorch for each shape; empty where unchecked.
        parity_max_abs: the largest of them.
        latency_ms: median time of a run in onnxruntime on the CPU, at the traced shape.
        seconds: what the export took.
        unchecked: what was not checked, and why.
        engine: the TensorRT engine, where one was built.
        gate: agreement with PyTorch on recorded calls and in sampling runs.
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
    """A graph to export, where to, why it cannot be checked, if so, and the largest value of one in float16."""

    gm: GraphModule
    keep: float
    students: tuple[str, ...]
    path: Path
    calls: Calls | None
    unchecked: str | None
    finetuned: bool = False
    largest: float | None = None

    def in_range(self, dtype: torch.dtype | None) -> ExportedMixture:
        """Return it with its largest value, where it is to leave as float16.

        Raises:
            PpclError: float16 does not hold it, or that cannot be told.
        """
        return replace(self, largest=largest_value(self.gm, self.calls, dtype, self.unchecked))


@dataclass(frozen=True)
class Job:
    """What is asked of an export.

    Attributes:
        config: the options.
        known: translations of look-alike blocks, used again and added to.
        sampling: a sampling run to compare.
        note: told in one line each what was copied.
        step: called after each of the `STEPS` steps of a graph.
    """

    config: ExportConfig
    known: Translations
    sampling: SamplingRun | None = None
    note: Callable[[str], None] = lambda line: None
    step: Callable[[], None] = lambda: None


@dataclass
class GraphExport:
    """What the graphs of one export share. Without a store each file holds its weights."""

    job: Job
    weights: WeightSource
    store: Store | None
    plan: Plan | None
    axes: Sequence[Axis] | None = None

    def export(self, mixture: ExportedMixture) -> Exported:
        """Export one graph."""
        started = time.perf_counter()
        prepared = prepare(*in_type(mixture.gm, mixture.calls, self.job.config.torch_dtype), found=self.axes)
        self.axes = prepared.axes
        self.job.step()
        made = translated(prepared, self.job.known, self._initial(mixture.gm))
        final, embed = mixture.path, self.store is None
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
                **checked,
            )
            publish(path, data, card, final)
        self.job.step()
        return Exported(
            keep=mixture.keep,
            onnx=final,
            params=card.params,
            students=mixture.students,
            opset=card.opset,
            parity=card.parity,
            parity_max_abs=card.parity_max_abs,
            latency_ms=card.latency_ms,
            seconds=time.perf_counter() - started,
            unchecked=card.unchecked,
            gate=card.gate,
        )

    def _initial(self, gm: GraphModule) -> Initial | None:
        from ppcl_fx.export.onnx.initializers import external, read_late

        if self.store is not None:
            return external(self.store, self.weights.pieces(gm))
        return read_late(self.weights, self.weights.pieces(gm)) if weightless(gm) else None

    def _checked(self, prepared: Prepared, path: Path, mixture: ExportedMixture) -> dict[str, Any]:
        """Compare to PyTorch and time; or say why not. Returns the fields of the manifest about it."""
        if mixture.unchecked is not None:
            self.job.step()
            return _found({}, None) | {
                "unchecked": mixture.unchecked,
                "gate": Gate(not_checked=[mixture.unchecked]),
            }
        if main_dtype(prepared.gm) in HALF:
            parity, answers = compare_in_float32(prepared, path)
            gate = self._gated(parity, answers, mixture)
            half = HalfPrecision(rounding=rounding(prepared), largest_value=mixture.largest)
            return _found(parity, None) | {"half": half, "gate": gate}
        parity, running = compare(prepared, path)
        gate = self._gated(parity, Answers.of(prepared, running), mixture)
        milliseconds = latency(
            running, prepared.lowered.feeds(prepared.calls["traced"]), self.job.config.runs
        )
        return _found(parity, milliseconds) | {"gate": gate}

    def _gated(self, parity: dict[str, float], answers: Answers, mixture: ExportedMixture) -> Gate:
        _check(parity, self.job.config.tolerance, mixture.path)
        found = gated(answers, mixture.calls, mixture.path, self.job.config, self.job.sampling)
        self.job.step()
        return found

    def _files(self, made: Any, data: Path | None) -> list[WeightFile]:
        from ppcl_fx.export.onnx.initializers import weight_files

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

    Raises:
        PpclError: as `ppcl_fx.export.export`.
    """
    dtype = job.config.torch_dtype
    mixtures = [mixture.in_range(dtype) for mixture in mixtures]  # before anything is written
    needed = {p.name for m in mixtures for ps in opened.weights.pieces(m.gm).values() for p in ps}
    replaced = [manifest_path(mixture.path).name for mixture in mixtures]
    typed = [manifest_path(typed_graph_path(mixture.path)).name for mixture in mixtures]
    former = weights_of(folder, [*replaced, *typed])
    sharing: AbstractContextManager[Store | None] = nullcontext(None)
    if not job.config.embed:
        sharing = stored(opened.weights, needed, folder, dtype, replaced, job.note)
    with sharing as store, alike_once(), traced_once():
        work = GraphExport(job, opened.weights, store, opened.model.plan, axes)
        results = []
        for mixture in mixtures:
            results.append(work.export(mixture))
            written()
    drop_unused(folder, former)
    return results


def _found(parity: dict[str, float], milliseconds: float | None) -> dict[str, Any]:
    largest = max(parity.values(), default=None)
    return {"parity": parity, "parity_max_abs": largest, "latency_ms": milliseconds, "unchecked": None}


def _check(parity: dict[str, float], tolerance: float, final: Path) -> None:
    worst = max(parity, key=lambda name: parity[name])
    if not parity[worst] <= tolerance:
        raise PpclError(
            f"{final}: the exported file differs from PyTorch by {parity[worst]:.2g} at the shape {worst!r}, more "
            f"than {tolerance:g}; nothing was kept; allow more with tolerance, or report the model"
        )


def _described(prepared: Prepared, written: Any) -> dict[str, Any]:
    """Return the fields of a sidecar that the file itself tells."""
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
