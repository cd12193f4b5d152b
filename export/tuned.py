"""Export a fine-tuned model: a mixture of one size, whose weights are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ppcl_fx.export.byte_ranges import byte_ranges
from ppcl_fx.export.exporting import ExportResult, Progress, write_folder
from ppcl_fx.export.extras import check_export
from ppcl_fx.export.gate import CALLS, SAMPLING_TOLERANCE, GateOptions
from ppcl_fx.export.names import graph_path, ratio_name
from ppcl_fx.export.one_graph import Mixture
from ppcl_fx.export.opened import MEMORY, Opened, unread
from ppcl_fx.export.publish import check_free
from ppcl_fx.export.weight_source import WeightSource
from ppcl_fx.shards import Shards

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls
    from ppcl_fx.export.sampling import SamplingRun
    from ppcl_fx.export.stitching import Translations
    from ppcl_fx.model import PluggableModel


class TunedFolder(Protocol):
    """A fine-tuned model with its weights left on disk, as `ppcl_fx.train.finetuned.FinetunedFolder` opens it.

    Attributes:
        student: the folder of the pluggable model that it was made from.
        model: that model, with its parameters on the meta device.
        graph: the fine-tuned mixture, with parameters of its own, on the meta device.
        file: its weights, by the names of the graph's parameters.
        students: the edits in it.
        keep: its share of the teacher's parameters.
    """

    student: Path
    model: PluggableModel
    graph: GraphModule
    file: Path
    students: Sequence[str]
    keep: float


def share(tuned: TunedFolder) -> float:
    """Return the ratio that a fine-tuned model is exported as: its share of the parameters, in thousandths."""
    return max(round(tuned.keep, 3), 0.001)


def export_finetuned(
    tuned: TunedFolder,
    out: str | Path,
    *,
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
    known: Translations | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Export a fine-tuned model as one ratio: ``keep-0.484.onnx``, its manifest, and ``head.json``.

    What is written, where the weights lie and what is checked is as for `ppcl_fx.export.export`. The weights stay
    where they are if `out` is the folder of the fine-tuned model, or one above it.

    Args:
        tuned: the model.
        out: the folder for the results.
        calls: as for `export`.
        dtype: as for `export`.
        embed: as for `export`.
        memory_limit: as for `export`.
        tolerance: as for `export`.
        check_calls: as for `export`.
        sampling: as for `export`.
        sampling_tolerance: as for `export`.
        runs: as for `export`.
        overwrite: as for `export`.
        known: as for `export`.
        progress: as for `export`.
        note: as for `export`.

    Raises:
        PpclError: as for `export`.
    """
    check_export()
    folder, keep = Path(out), share(tuned)
    path = graph_path(folder, ratio_name(keep))
    check_free([path], overwrite)
    opened, graph = _opened(tuned, memory_limit, dtype)
    mixture = Mixture(graph, keep, tuple(tuned.students), path, calls, opened.unchecked, finetuned=True)
    results = write_folder(
        opened,
        [mixture],
        folder,
        dtype=dtype,
        embed=embed,
        tolerance=tolerance,
        runs=runs,
        known=known,
        gate=GateOptions(check_calls, sampling, sampling_tolerance),
        progress=progress,
        note=note,
    )
    return ExportResult(folder, tuple(results))


def _opened(tuned: TunedFolder, limit: int, dtype: torch.dtype | None) -> tuple[Opened, GraphModule]:
    """Return where the weights are, and the graph: with its weights, where that stays within a limit in bytes."""
    graph, shards = tuned.graph, Shards.one_file(tuned.file)
    graph.eval()
    first = _first_names(graph)
    dtypes = {name: parameter.dtype for name, parameter in graph.named_parameters()}

    def read(name: str) -> Tensor:
        return shards.checked(first[name]).to(dtypes[first[name]])

    places = byte_ranges(tuned.file)
    ranges = {name: places[first[name]] for name in first}
    weights = WeightSource(graph, read, shards.close, ranges, tuned.student)
    why = unread(weights, dtype, limit)
    if why is None:
        own = {name: nn.Parameter(read(name), requires_grad=False) for name in dtypes}
        for name in first:
            parent, _, leaf = name.rpartition(".")
            graph.get_submodule(parent)._parameters[leaf] = own[first[name]]
    return Opened(tuned.model, weights, why), graph


def _first_names(graph: GraphModule) -> dict[str, str]:
    """Return for each parameter the first of the names that it has; the file knows it by that."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(p), name) for name, p in graph.named_parameters(remove_duplicate=False)}
