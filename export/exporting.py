"""From a pluggable model to one checked file for each ratio."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import GraphModule

from ppcl_fx._version import __version__
from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import check_export, need
from ppcl_fx.export.graph_run import refresh_examples
from ppcl_fx.export.onnx_file import Prepared, compare, floats_as, parameters_in, ports, prepare, write_onnx
from ppcl_fx.export.parity import latency
from ppcl_fx.export.runtime.head import write_head
from ppcl_fx.export.sidecar import Sidecar
from ppcl_fx.files import new_folder, write_json
from ppcl_fx.graphs import parameter_count
from ppcl_fx.tracing import bind

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export.stitching import Translations
    from ppcl_fx.export.tensorrt import Profile
    from ppcl_fx.model import PluggableModel
    from ppcl_fx.plan import Plan

FORMATS = ("onnx", "tensorrt")
FILE = "transformer.onnx"
SIDECAR = "transformer.json"
STEPS = 4
"""Steps of the work on one ratio: preparing, translating, checking, timing."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """One exported ratio.

    Attributes:
        keep: the share asked for.
        onnx: the ONNX file; ``transformer.json`` beside it says how it was made.
        params: parameters of the mixture, as the plan counts them.
        students: ids of the edits plugged.
        opset: version of the ONNX operators.
        parity: the largest difference to PyTorch for each shape.
        parity_max_abs: the largest of them.
        latency_ms: median time of a run in onnxruntime on the CPU, at the traced shape.
        seconds: what the export took.
        engine: the TensorRT engine, where one was built.
    """

    keep: float
    onnx: Path
    params: int
    students: tuple[str, ...]
    opset: int
    parity: dict[str, float]
    parity_max_abs: float
    latency_ms: float
    seconds: float
    engine: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        plain = asdict(self)
        return plain | {"onnx": str(self.onnx), "engine": str(self.engine) if self.engine else None}


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote, in the order of the ratios."""

    folder: Path
    ratios: tuple[Exported, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON knows it."""
        return {"folder": str(self.folder), "ratios": [ratio.to_json() for ratio in self.ratios]}


def export(
    model: PluggableModel,
    keeps: Sequence[float],
    out: str | Path,
    *,
    format: Literal["onnx", "tensorrt"] = "onnx",
    calls: Calls | None = None,
    tolerance: float = 1e-4,
    runs: int = 10,
    overwrite: bool = False,
    profile: Profile | None = None,
    known: Translations | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a pluggable model once for each ratio.

    Each ratio gets a folder ``keep-0.7`` with ``transformer.onnx`` (float32), its weights ``transformer.onnx.data`` and
    ``transformer.json``. Batch, image and text lengths stay open; position tables are inputs. Every file has passed
    `onnx.checker`, and onnxruntime gave on it what PyTorch gives, at the traced shape, with each open size
    changed alone, and with all of them changed. A file that fails is not kept.

    Args:
        model: the model; its mixture is put back afterwards.
        keeps: shares of the teacher's parameters, each in (0, 1].
        out: the folder for the results.
        format: ``onnx``, or ``tensorrt`` for an engine beside each ONNX file.
        calls: recorded calls; the first gives the example. Without them the inputs are random, of the shape the
            model was traced with.
        tolerance: largest difference to PyTorch that is allowed, absolute, in float32.
        runs: runs timed for the latency.
        overwrite: replace the folders of these ratios where they exist.
        profile: for TensorRT, the range of each open size; by default one around the example.
        known: translations of look-alike blocks to use again; those made here are added.
        progress: called with the steps done and the number of all.

    Raises:
        PpclError: a ratio cannot be reached, a library is missing, the model cannot be exported, or a file
            differs from PyTorch by more than `tolerance`. For ``tensorrt`` without TensorRT or without a GPU it is
            raised last, and the ONNX files stay.
    """
    if format not in FORMATS:
        raise PpclError(f"no format {format!r}{near(format, FORMATS)}; it is one of {', '.join(FORMATS)}")
    check_export()
    from ppcl_fx.export.stitching import Translations

    folder = Path(out)
    before = model.students
    known = known if known is not None else Translations()
    steps = _Steps(progress, STEPS * len(keeps))
    try:
        mixtures = [(keep, model.plug(keep=keep).students) for keep in keeps]  # all can be reached, or none is begun
        results = [
            export_graph(
                model.plug(students=students).graph_module(),
                folder / f"keep-{keep:g}",
                calls=calls,
                keep=keep,
                students=students,
                plan=model.plan,
                tolerance=tolerance,
                runs=runs,
                overwrite=overwrite,
                known=known,
                step=steps.done,
            )
            for keep, students in mixtures
        ]
        write_head(model, folder)
        if format == "tensorrt":
            from ppcl_fx.export.engines import build_engines

            results = build_engines(model, results, calls, profile)
    finally:
        model.plug(students=before)
    return ExportResult(folder, tuple(results))


def export_graph(
    gm: GraphModule,
    folder: str | Path,
    *,
    calls: Calls | None = None,
    keep: float = 1.0,
    students: Sequence[str] = (),
    plan: Plan | None = None,
    tolerance: float = 1e-4,
    runs: int = 10,
    overwrite: bool = False,
    known: Translations | None = None,
    step: Callable[[], None] = lambda: None,
) -> Exported:
    """Export one traced graph, a fine-tuned student for example, with the same checks as `export`.

    Args:
        gm: the graph.
        folder: the folder to write.
        calls: as for `export`.
        keep: its share of the teacher's parameters, for the sidecar.
        students: ids of the edits in it, for the sidecar.
        plan: the plan they come from, for the sidecar.
        tolerance: as for `export`.
        runs: as for `export`.
        overwrite: replace the folder if it exists.
        known: translations of other graphs of the same model, used again where blocks look alike.
        step: called after each of the `STEPS` steps.

    Raises:
        PpclError: as for `export`.
    """
    check_export()
    from ppcl_fx.export.stitching import Translations

    started = time.perf_counter()
    final = Path(folder)
    prepared = prepare(*in_type(gm, calls, torch.float32))
    step()
    with new_folder(final, overwrite=overwrite) as beside:
        written = write_onnx(prepared, beside / FILE, known if known is not None else Translations())
        step()
        parity, running = compare(prepared, beside / FILE)
        _check(parity, tolerance, final)
        step()
        card = Sidecar(
            **_described(prepared, written),
            keep=keep,
            params=parameter_count(gm),
            students=list(students),
            plan=plan,
            parity=parity,
            parity_max_abs=max(parity.values()),
            tolerance=tolerance,
            latency_ms=latency(running, prepared.lowered.feeds(prepared.calls["traced"]), runs),
        )
        write_json(beside / SIDECAR, card)
        step()
    return Exported(
        keep=keep,
        onnx=final / FILE,
        params=card.params,
        students=tuple(students),
        opset=card.opset,
        parity=parity,
        parity_max_abs=card.parity_max_abs,
        latency_ms=card.latency_ms,
        seconds=time.perf_counter() - started,
    )


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
    passes = [str(record["name"]) for record in gm.meta.get("ppcl", {}).get("passes", [])]
    return {
        "file": FILE,
        "dtype": str(next(gm.parameters()).dtype).removeprefix("torch."),
        "params_in_file": parameters_in(written, gm),
        "opset": written.graph.opset_imports[""],
        "inputs": ports(written.graph.inputs),
        "outputs": ports(written.graph.outputs),
        "positions": [name for name in prepared.lowered.inputs if name not in tensors],
        "made": {"ppcl_fx": __version__, **versions, "passes": passes},
    }


def in_type(
    gm: GraphModule, calls: Calls | None, dtype: torch.dtype
) -> tuple[GraphModule, dict[str, Any], int]:
    """Return a graph on the CPU with weights of a type, and a call for it in that type.

    Args:
        gm: the graph; stays as it is.
        calls: where the call comes from, see `example`.
        dtype: the type of weights and floating-point inputs, as in a pipeline of that type.

    Returns:
        The graph, itself where it is of that type already, else a copy; the arguments of the call; its samples.
    """
    kwargs, batch = example(gm, calls)
    kwargs = floats_as(kwargs, dtype)
    if all(p.dtype == dtype and p.device.type == "cpu" for p in gm.parameters() if p.is_floating_point()):
        return gm, kwargs, batch
    converted = copy.deepcopy(gm).to(device="cpu", dtype=dtype)
    converted.meta = dict(gm.meta)
    refresh_examples(converted, kwargs)
    return converted, kwargs, batch


def example(gm: GraphModule, calls: Calls | None) -> tuple[dict[str, Any], int]:
    """Return the arguments of one call of a graph and the samples in it.

    Args:
        gm: the graph.
        calls: recorded calls; without them tensors are random, in the shapes of the trace.

    Raises:
        PpclError: there are no calls in `calls`, or the first lies outside of what was traced.
    """
    if calls is not None:
        if len(calls) == 0:
            raise PpclError("there are no calls to take an example from; record some")
        return bind(gm, calls[0].kwargs), calls[0].batch
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            kwargs[str(node.target)] = _random(value, generator) if isinstance(value, torch.Tensor) else value
    first = [v.shape[0] for v in kwargs.values() if isinstance(v, torch.Tensor) and v.ndim]
    return kwargs, Counter(first).most_common(1)[0][0]


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, generator=generator).to(like.dtype)
    return torch.ones(like.shape, dtype=like.dtype)


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.count = progress, total, 0
        if progress is not None:
            progress(0, total)

    def done(self) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, self.total)
