"""From a model to one small checked graph for each ratio over one copy of the weights, to engines, or to folders."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.export.config import ENGINES, FOLDERS, KEEPS, ExportConfig
from ppcl_fx.export.extras import check_export
from ppcl_fx.export.one_graph import STEPS, Exported, ExportedMixture, GraphExport, Job, write_graphs
from ppcl_fx.export.onnx.segments import Translations
from ppcl_fx.export.onnx.writer import call_of, in_type, prepare
from ppcl_fx.export.quantising import rounded_weights
from ppcl_fx.export.runtime.model_spec import write_model_spec
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import graph_path, manifest_path, ratio_name, typed_graph_path
from ppcl_fx.export.store.publish import check_free, claimed, writing
from ppcl_fx.export.store.weight_source import Opened, WeightSource
from ppcl_fx.export.tensorrt.folder import Built, build_folder
from ppcl_fx.export.tensorrt.manifest import NOT_COMPARED
from ppcl_fx.export.tensorrt.request import Origin, find_graphs
from ppcl_fx.export.tensorrt.trtexec import write_script
from ppcl_fx.export.verify.sizes import refused
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import new_folder, read_json
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder
from ppcl_fx.passes.calibration.calibration import Notify, silent
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.export.verify.sampling import SamplingRun


@dataclass(frozen=True)
class ModelFolder:
    """A folder that other programs load: one ratio in the format ``diffusers`` or ``released``."""

    keep: float
    params: int
    plugged: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, in the order of the ratios: graphs, and their engines or what builds them; or folders."""

    folder: Path
    ratios: tuple[Exported, ...] = ()
    engines: tuple[Built, ...] = ()
    script: Path | None = None
    folders: tuple[ModelFolder, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON knows it."""
        found: dict[str, Any] = {"folder": str(self.folder), "ratios": [ratio.to_json() for ratio in self.ratios]}
        if self.engines:
            found["engines"] = [one.to_json() for one in self.engines]
        return found | ({"script": str(self.script)} if self.script is not None else {})


def export(
    model: PluggableModel | StudentFolder | FinetunedFolder,
    out: str | Path,
    config: ExportConfig | None = None,
    *,
    calls: Calls | None = None,
    sampling: SamplingRun | None = None,
    known: Translations | None = None,
    progress: Notify = silent,
    note: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> ExportResult:
    """Export a pluggable model once for each ratio, or a fine-tuned one as one ratio.

    Each ratio gets a small graph ``keep-0.7.onnx`` and its manifest ``keep-0.7.json``; ``head.json`` is for the
    runtime. The weights stay where they are if `out` is the model's folder or one above it; else they are copied to
    ``weights/``, once for all ratios. Batch, image and text lengths stay open; position tables are inputs. Every file
    has passed `onnx.checker`, and onnxruntime gave on it what PyTorch gives, at the traced shape, with each open size
    changed alone, with all of them changed, on recorded calls and over a whole sampling run. A file that fails is not
    kept, and those of earlier ratios stay. In the formats of engines each float32 ratio is written once more in
    bfloat16, and ``build.json`` says what is to be built.

    Args:
        model: the model, in memory (its mixture is put back afterwards); or a student or fine-tuned folder with its
            weights on disk, loaded for the checks where the memory limit allows it.
        out: the folder for the results.
        config: the options.
        calls: recorded calls; the first gives the example, and some are compared. Without them the inputs are random,
            of the shape the model was traced with.
        sampling: a sampling run to compare, with PyTorch and with the file in a pipeline.
        known: translations of look-alike blocks to use again; those made here are added.
        progress: told how far it is.
        note: told in one line each what was copied and what was not checked.
        **options: fields of `ExportConfig` by name, over those of `config`.

    Raises:
        PpclError: an option is unknown or makes no sense, a ratio cannot be reached, a library is missing, the model
            cannot be exported, there is no room, or a file differs from PyTorch by more than is allowed. Where
            the library that builds is missing, or TensorRT finds no GPU, it is raised last, and the ONNX files stay.
    """
    config, folder = ExportConfig.merged(config, options), Path(out)
    if isinstance(model, FinetunedFolder):
        _check_tuned(model, config)
    if config.format in FOLDERS:
        return _model_folders(model, folder, config, progress)
    check_export()
    job = Job(config, known or Translations(), calls, sampling, note)
    tuned = model if isinstance(model, FinetunedFolder) else None
    keeps = config.keep or KEEPS if tuned is None else (max(round(tuned.keep, 3), 0.001),)
    paths = [graph_path(folder, ratio_name(keep)) for keep in keeps]
    check_free(paths, config.overwrite)
    opened = _opened(model, config, calls)
    before = opened.model.students
    try:
        mixtures = []  # all can be reached, or none is begun
        for keep, path in zip(keeps, paths, strict=True):
            if tuned is None:
                gm, students = opened.model.plug(keep=keep).graph_module(), opened.model.students
            else:
                gm, students = tuned.graph, tuple(tuned.students)
            typed = opened.in_type(students)
            mixtures.append(ExportedMixture(gm, keep, students, path, finetuned=tuned is not None, typed=typed))
        done = ExportResult(folder, tuple(_write_folder(opened, mixtures, folder, job, progress)))
        if isinstance(model, FinetunedFolder) or config.format not in ENGINES:
            return done
        return _engines(model, done, job, progress)
    finally:
        opened.model.plug(students=before)


def _opened(
    model: PluggableModel | StudentFolder | FinetunedFolder, config: ExportConfig, calls: Calls | None
) -> Opened:
    """Open a model, in the type that it is to leave in."""
    opened = Opened.of(model, config)
    root = opened.weights.root
    return opened.typed(in_type(root, opened.model.plan, config.torch_dtype, calls))


def _check_tuned(tuned: FinetunedFolder, config: ExportConfig) -> None:
    """Refuse what a fine-tuned model, which has one size and one form, is not exported as."""
    if config.keep is not None:
        asked = ",".join(f"{keep:g}" for keep in config.keep)
        raise PpclError(f"--keep {asked}: the model beside {tuned.student}: is, which has one size; leave it out")
    way = f"leave it out, or export {tuned.student}"
    if config.format in ENGINES:
        library = " --for rtx" if config.library == "rtx" else ""
        way = f"export it with --dtype bf16, and then run 'ppcl-fx build{library}' on the result"
    if config.format != "onnx":
        raise PpclError(f"--format {config.format}: not for a fine-tuned model; {way}")


def _engines(
    model: PluggableModel | StudentFolder, done: ExportResult, job: Job, progress: Notify
) -> ExportResult:
    """Write the graphs in the engines' type and what to build from them; then build, where that is wanted."""
    progress(0, 1, "writing bfloat16 graphs")
    example = write_typed(model, done.ratios, job)
    config = job.config.build.request(job.config.library, example)
    for onnx in find_graphs(done.folder).values():
        config.profiles(onnx)
    config.save(done.folder)
    if job.config.format == "trtexec":
        return replace(done, script=write_script(done.folder, config))
    if job.config.onnx_only:
        return done
    built = build_folder(done.folder, config, overwrite=True, report=progress)
    config.save(done.folder)
    job.note(NOT_COMPARED)
    engines = {one.name: one.engine for one in built}
    ratios = tuple(replace(ratio, engine=engines.get(ratio.onnx.stem)) for ratio in done.ratios)
    return replace(done, ratios=ratios, engines=tuple(built))


def _model_folders(
    model: PluggableModel | StudentFolder | FinetunedFolder, out: Path, config: ExportConfig, progress: Notify
) -> ExportResult:
    """Write a model folder for each share: OUT/keep-0.5 and so on, all or none."""
    from ppcl_fx.formats.released import save_released
    from ppcl_fx.formats.stock import save_stock

    if not isinstance(model, PluggableModel):
        raise PpclError(f"--format {config.format}: only for a model that is loaded; give ppcl_fx.load(STUDENT)")
    write, keeps, found = (save_stock if config.format == "diffusers" else save_released, config.keep or KEEPS, [])
    before = model.students
    try:
        with new_folder(out, replaces=owned.PRUNED_RATIOS if config.overwrite else None) as beside:
            mixtures = [(keep, model.plug(keep=keep).students) for keep in keeps]
            for number, (keep, students) in enumerate(mixtures, start=1):
                write(model.plug(students=students), beside / ratio_name(keep))
                found.append(ModelFolder(keep, model.param_count(), students, out / ratio_name(keep)))
                progress(number, len(keeps))
    finally:
        model.plug(students=before)
    return ExportResult(out, folders=tuple(found))


def _write_folder(
    opened: Opened, mixtures: Sequence[ExportedMixture], folder: Path, job: Job, progress: Notify
) -> list[Exported]:
    """Write a graph for each mixture of a model and ``head.json`` to a folder, which is made where it is not there."""
    steps, total = itertools.count(), STEPS * len(mixtures)

    def step() -> None:
        progress(next(steps), total)

    step()
    new = not folder.exists()
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder, [mixture.path for mixture in mixtures]):
            # The model spec with the first of them: later ratios may fail, and this one stays.
            spec = functools.partial(write_model_spec, opened.model, folder)
            results = write_graphs(opened, mixtures, folder, replace(job, step=step), written=spec)
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for line in dict.fromkeys(line for ratio in results if ratio.gate for line in ratio.gate.not_checked):
        job.note(line)
    return results


def export_graph(
    gm: GraphModule,
    path: str | Path,
    config: ExportConfig | None = None,
    *,
    calls: Calls | None = None,
    origin: Origin | None = None,
    sampling: SamplingRun | None = None,
    known: Translations | None = None,
) -> Exported:
    """Export one traced graph, a fine-tuned student for example, as a file that holds its weights.

    Args:
        gm: the graph, in memory.
        path: the file to write, ``NAME.onnx``; its manifest is ``NAME.json``.
        config: the options, but for those that are about ratios and engines.
        calls: as `export` takes them, and so `sampling` and `known`.
        origin: for the manifest its share of the teacher's parameters, the edits in it, and their plan.

    Raises:
        PpclError: the graph cannot be exported, there is no room, or the file differs from PyTorch by more than is
            allowed.
    """
    check_export()
    path, config, origin = Path(path), config or ExportConfig(), origin or Origin()
    check_free([path], config.overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    job = Job(config, known or Translations(), calls, sampling)
    keep = 1.0 if origin.keep is None else origin.keep
    typed = in_type(gm, Plan(), config.torch_dtype, calls)
    mixture = ExportedMixture(gm, keep, tuple(origin.students), path, typed=typed).measured(calls, None)
    weights = WeightSource.memory(gm, typed)
    with claimed(path.parent, [path]), rounded_weights(weights, {path: gm}, calls, config) as few:
        return GraphExport(job, few.source if few else weights, plan=origin.plan, rounding=few).export(mixture)


def write_typed(
    model: PluggableModel | StudentFolder, exported: Sequence[Exported], job: Job
) -> dict[str, int]:
    """Export each ratio that is in float32 once more in bfloat16, for engines, over one converted copy of the weights.

    The types of an ONNX file are its engine's. A ratio in another type, or that was asked for in float32, is built as
    it is. Sizes to build for that the model does not take are refused here, where the model is; its mixture is another
    one afterwards.

    Returns:
        The sizes of the example, by the names of the open sizes.
    """
    config = job.config.model_copy(update={"dtype": "bf16", "embed": False})
    float32 = {
        ratio.onnx
        for ratio in exported
        if job.config.dtype != "fp32" and read_json(manifest_path(ratio.onnx), Manifest).dtype == "float32"
    }
    opened = _opened(model, config, job.calls) if float32 else Opened.of(model, config)
    graphs = [opened.model.plug(students=ratio.students).graph_module() for ratio in exported]
    prepared = prepare(graphs[0], *call_of(graphs[0], job.calls))
    sizes = {axis.name: axis.size for axis in prepared.axes}
    onnx, request = exported[0].onnx, config.build.request(config.library, sizes)
    for profile in request.profiles(onnx):
        for end in ("max", "min"):
            reason = refused(prepared, {name: getattr(size, end) for name, size in profile.sizes.items()})
            if reason is not None:
                raise PpclError(f"profile {profile.name or 'of the options'}: {reason}; give another range")
    mixtures = [
        ExportedMixture(
            gm, ratio.keep, ratio.students, typed_graph_path(ratio.onnx), typed=opened.in_type(ratio.students)
        )
        for gm, ratio in zip(graphs, exported, strict=True)
        if ratio.onnx in float32
    ]
    if mixtures:
        with claimed(onnx.parent, [mixture.path for mixture in mixtures]):
            typed = replace(job, config=config, step=lambda: None)
            write_graphs(opened, mixtures, onnx.parent, typed, axes=prepared.axes)
    return sizes
