"""From a pluggable model to one small checked graph for each ratio, over one copy of the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.claim import claimed
from ppcl_fx.export.extras import check_export
from ppcl_fx.export.gate import CALLS, SAMPLING_TOLERANCE, GateOptions
from ppcl_fx.export.graph_run import alike_once
from ppcl_fx.export.names import graph_path, manifest_path, ratio_name, typed_graph_path
from ppcl_fx.export.one_graph import Exported, Mixture, Work
from ppcl_fx.export.opened import MEMORY, Opened
from ppcl_fx.export.publish import check_free, writing
from ppcl_fx.export.runtime.head import write_head
from ppcl_fx.export.unused import drop_unused, weights_of
from ppcl_fx.export.weight_source import WeightFolder, WeightSource
from ppcl_fx.export.weight_store import Store, stored
from ppcl_fx.passes.expand import traced_once

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export.axes import Axis
    from ppcl_fx.export.sampling import SamplingRun
    from ppcl_fx.export.stitching import Translations
    from ppcl_fx.export.tensorrt import Profile
    from ppcl_fx.model import PluggableModel
    from ppcl_fx.plan import Plan

FORMATS = ("onnx", "tensorrt")
DTYPES: dict[str, torch.dtype | None] = {
    "stored": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Names of what weights may be exported as."""

STEPS = 4
"""Steps of the work on one ratio: preparing, translating, checking, timing."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, in the order of the ratios."""

    folder: Path
    ratios: tuple[Exported, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON knows it."""
        return {"folder": str(self.folder), "ratios": [ratio.to_json() for ratio in self.ratios]}


def export(
    model: PluggableModel | WeightFolder,
    keeps: Sequence[float],
    out: str | Path,
    *,
    format: Literal["onnx", "tensorrt"] = "onnx",
    calls: Calls | None = None,
    dtype: torch.dtype | None = None,
    embed: bool = False,
    memory_limit: int = MEMORY,
    tolerance: float = 1e-4,
    check_calls: int = CALLS,
    sampling: SamplingRun | None = None,
    sampling_tolerance: float = SAMPLING_TOLERANCE,
    runs: int = 10,
    overwrite: bool = False,
    profile: Profile | None = None,
    known: Translations | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Export a pluggable model once for each ratio.

    Each ratio gets a small graph ``keep-0.7.onnx`` and its manifest ``keep-0.7.json``; ``head.json`` is for the
    runtime. The weights stay where they are if `out` is the student's folder or one above it; else they are
    copied to ``weights/``, once for all ratios. Batch, image and text lengths stay open; position tables are
    inputs. Every file has passed `onnx.checker`, and onnxruntime gave on it what PyTorch gives, at the traced
    shape, with each open size changed alone, with all of them changed, on recorded calls and over a whole sampling
    run. A file that fails is not kept, and those of earlier ratios stay. What was not checked is in the manifest and
    is told to `note`.

    Args:
        model: the model, in memory (its mixture is put back afterwards), or a student folder with its weights on disk.
            Such a folder is loaded for the checks where `memory_limit` allows it; else no weight is read.
        keeps: shares of the teacher's parameters, each in (0, 1].
        out: the folder for the results.
        format: ``onnx``, or ``tensorrt`` for an engine beside each ONNX file.
        calls: recorded calls; the first gives the example, and some are compared. Without them the inputs are random,
            of the shape the model was traced with.
        dtype: of weights and floating-point inputs; as they are used when None. Another one than they are stored in
            costs a converted copy, one for all ratios.
        embed: write ordinary files that hold their weights.
        memory_limit: bytes that loading a student folder and checking its graphs may take.
        tolerance: what is allowed: the largest difference to PyTorch on the shapes, absolute; on a recorded call the
            relative error, norm over norm.
        check_calls: recorded calls to compare, at most, from the earliest timestep to the latest.
        sampling: a sampling run to compare, with PyTorch and with the file in a pipeline.
        sampling_tolerance: relative error that is allowed for each picture (latent) of that run.
        runs: runs timed for the latency.
        overwrite: replace the files of these ratios where they exist.
        profile: for TensorRT, the range of each open size; by default one around the example.
        known: translations of look-alike blocks to use again; those made here are added.
        progress: called with the steps done and the number of all.
        note: told in one line each what was copied and what was not checked.

    Raises:
        PpclError: a ratio cannot be reached, a library is missing, the model cannot be exported, there is no room, or a
            file differs from PyTorch by more than is allowed. For ``tensorrt`` without TensorRT or without a GPU it
            is raised last, and the ONNX files stay.
    """
    if format not in FORMATS:
        raise PpclError(f"no format {format!r}{near(format, FORMATS)}; it is one of {', '.join(FORMATS)}")
    check_export()
    folder = Path(out)
    paths = [graph_path(folder, ratio_name(keep)) for keep in keeps]
    check_free(paths, overwrite)
    given, opened = model, Opened.of(model, memory_limit, dtype)
    model = opened.model
    before = model.students
    gate = GateOptions(check_calls, sampling, sampling_tolerance)
    try:
        mixtures = []  # all can be reached, or none is begun
        for keep, path in zip(keeps, paths, strict=True):
            gm = model.plug(keep=keep).graph_module()
            mixtures.append(Mixture(gm, keep, model.students, path, calls, opened.unchecked))
        results = write_folder(
            opened,
            mixtures,
            folder,
            dtype=dtype,
            embed=embed,
            tolerance=tolerance,
            runs=runs,
            known=known,
            gate=gate,
            progress=progress,
            note=note,
        )
        if format == "tensorrt":
            from ppcl_fx.export.engines import build_engines
            from ppcl_fx.export.tensorrt.manifest import NOT_COMPARED

            results = build_engines(given, results, calls, profile, memory_limit, tolerance, gate)
            note(NOT_COMPARED)
    finally:
        model.plug(students=before)
    return ExportResult(folder, tuple(results))


def write_folder(
    opened: Opened,
    mixtures: Sequence[Mixture],
    folder: Path,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> list[Exported]:
    """Write a graph for each mixture of a model and ``head.json`` to a folder, which is made where it is not there.

    Args:
        opened: the model.
        mixtures: what to write.
        folder: where to.
        progress: as for `export`.
        note: as for `export`; told what was not checked, too.
        how: options of `write_graphs`.

    Raises:
        PpclError: as for `export`, or another export writes to the folder.
    """
    steps = _Steps(progress, STEPS * len(mixtures))
    new = not folder.exists()
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder, [mixture.path for mixture in mixtures]):
            # The head with the first of them: later ratios may fail, and this one stays.
            head = functools.partial(write_head, opened.model, folder)
            results = write_graphs(opened, mixtures, folder, step=steps.done, note=note, written=head, **how)
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for line in dict.fromkeys(line for ratio in results if ratio.gate for line in ratio.gate.not_checked):
        note(line)
    return results


def export_graph(
    gm: GraphModule,
    path: str | Path,
    *,
    calls: Calls | None = None,
    keep: float = 1.0,
    students: Sequence[str] = (),
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-4,
    check_calls: int = CALLS,
    sampling: SamplingRun | None = None,
    sampling_tolerance: float = SAMPLING_TOLERANCE,
    runs: int = 10,
    overwrite: bool = False,
    known: Translations | None = None,
    step: Callable[[], None] = lambda: None,
) -> Exported:
    """Export one traced graph, a fine-tuned student for example, as a file that holds its weights.

    Args:
        gm: the graph, in memory.
        path: the file to write, ``NAME.onnx``; its manifest is ``NAME.json``.
        calls: as for `export`.
        keep: its share of the teacher's parameters, for the manifest.
        students: ids of the edits in it, for the manifest.
        plan: the plan they come from, for the manifest.
        dtype: as for `export`.
        tolerance: as for `export`.
        check_calls: as for `export`.
        sampling: as for `export`.
        sampling_tolerance: as for `export`.
        runs: as for `export`.
        overwrite: replace the file if it exists.
        known: translations of other graphs of the same model, used again where blocks look alike.
        step: called after each of the `STEPS` steps.

    Raises:
        PpclError: as for `export`.
    """
    check_export()
    from ppcl_fx.export.stitching import Translations

    path = Path(path)
    check_free([path], overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    gate = GateOptions(check_calls, sampling, sampling_tolerance)
    known = known or Translations()
    work = Work(WeightSource.memory(gm), None, dtype, tolerance, runs, known, plan, step, gate=gate)
    mixture = Mixture(gm, keep, tuple(students), path, calls, None).in_range(dtype)
    with claimed(path.parent, [path]):
        return work.export(mixture)


def write_graphs(
    opened: Opened,
    mixtures: Sequence[Mixture],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    embed: bool = False,
    tolerance: float = 1e-4,
    runs: int = 10,
    known: Translations | None = None,
    axes: Sequence[Axis] | None = None,
    gate: GateOptions | None = None,
    step: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda line: None,
    written: Callable[[], object] = lambda: None,
) -> list[Exported]:
    """Write a graph for each mixture of a model, in place of what is there, over one copy of the weights.

    Args:
        opened: the model.
        mixtures: what to write.
        folder: where the graphs lie; held by the caller (`ppcl_fx.export.claim`).
        dtype: as for `export`.
        embed: as for `export`.
        tolerance: as for `export`.
        runs: as for `export`.
        known: as for `export`.
        axes: sizes that may change, where they are known already.
        gate: what is compared beyond the shapes.
        step: called after each of the `STEPS` steps of a mixture.
        note: as for `export`.
        written: called after each mixture that is there.

    Raises:
        PpclError: as for `export`.
    """
    from ppcl_fx.export.stitching import Translations

    mixtures = [mixture.in_range(dtype) for mixture in mixtures]  # before anything is written
    needed = {p.name for m in mixtures for ps in opened.weights.pieces(m.gm).values() for p in ps}
    replaced = [manifest_path(mixture.path).name for mixture in mixtures]
    typed = [manifest_path(typed_graph_path(mixture.path)).name for mixture in mixtures]
    former = weights_of(folder, [*replaced, *typed])
    sharing: AbstractContextManager[Store | None] = nullcontext(None)
    if not embed:
        sharing = stored(opened.weights, needed, folder, dtype, replaced, note)
    with sharing as store, alike_once(), traced_once():
        known = known or Translations()
        gate = gate or GateOptions()
        work = Work(opened.weights, store, dtype, tolerance, runs, known, opened.model.plan, step, axes, gate)
        results = []
        for mixture in mixtures:
            results.append(work.export(mixture))
            written()
    drop_unused(folder, former)
    return results


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.count = progress, total, 0
        if progress is not None:
            progress(0, total)

    def done(self) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, self.total)
