"""Build the engines of an exported folder, one for each ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.names import TIMINGS, manifest_path
from ppcl_fx.export.tensorrt.build import build_engine, load_tensorrt
from ppcl_fx.export.tensorrt.manifest import EngineManifest, Hashes, check_card, read_card
from ppcl_fx.export.tensorrt.options import check_version
from ppcl_fx.export.tensorrt.places import GraphPlace, find_graphs, read_graph, read_origin
from ppcl_fx.export.tensorrt.profiles import Profile
from ppcl_fx.export.tensorrt.request import BuildConfig, read_request
from ppcl_fx.export.tensorrt_api import Api, Gpu
from ppcl_fx.export.verify.integrity import check_artefacts

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Built:
    """One engine of a folder.

    Attributes:
        name: the ratio, ``keep-0.7``.
        engine: the engine.
        card: its manifest.
        kept: whether it was there already, and fits.
    """

    name: str
    engine: Path
    card: EngineManifest
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        card = self.card.model_dump(mode="json", exclude={"plan"})
        return {"name": self.name, "engine": str(self.engine), "kept": self.kept, "card": card}


def build_folder(
    folder: str | Path,
    request: BuildConfig | None = None,
    *,
    overwrite: bool = False,
    tensorrt: tuple[Api, Gpu] | None = None,
    report: Report | None = None,
) -> list[Built]:
    """Build an engine for each graph of an exported folder.

    Everything that can be refused is refused before the first build. An engine that is there already, for this GPU,
    version, graph, profiles and options, is kept: a build that was stopped goes on where it was.

    Args:
        folder: the folder.
        request: what to build; by default what ``build.json`` in the folder says.
        overwrite: replace engines that are there.
        tensorrt: TensorRT and the GPU; found if left out.
        report: told the share that is done of all builds in percent, 100, and what is being done.

    Raises:
        PpclError: the folder holds no graph, a graph or its weights are not what was exported, the profiles do not fit,
            there is no TensorRT or no GPU, an engine is there already and is another, or a build fails. Engines that
            were built before stay.
    """
    root = Path(folder)
    places = find_graphs(root)
    request = request or read_request(root)
    profiles = [request.profiles(read_graph(place.onnx), str(place.onnx)) for place in places]
    api, gpu = tensorrt or load_tensorrt(f"the ONNX files stay in {root}")
    check_version(str(api.value("__version__")), request.options)
    hashes = Hashes()
    for place in places:
        if manifest_path(place.onnx).is_file():
            check_artefacts(place.onnx, sha256=lambda path: hashes.mark(path).sha256)
    kept = [
        None if overwrite else _there(place, wanted, request, api, gpu, hashes)
        for place, wanted in zip(places, profiles, strict=True)
    ]
    results = []
    for index, (place, wanted, card) in enumerate(zip(places, profiles, kept, strict=True)):
        made = card or build_engine(
            place.onnx,
            place.engine,
            wanted,
            request.options,
            api=api,
            gpu=gpu,
            cache=root / TIMINGS,
            origin=read_origin(place),
            hashes=hashes,
            report=_part(report, index, len(places), place.name),
        )
        results.append(Built(place.name, place.engine, made, kept=card is not None))
    return results


def _there(
    place: GraphPlace, profiles: list[Profile], request: BuildConfig, api: Api, gpu: Gpu, hashes: Hashes
) -> EngineManifest | None:
    """Return the manifest of an engine that is there and is the one wanted."""
    if not place.engine.exists():
        return None
    try:
        card = read_card(place.engine)
        check_card(card, place.engine, gpu=gpu, tensorrt=str(api.value("__version__")), hashes=hashes, weights=True)
    except PpclError as error:
        raise PpclError(f"{place.engine}: is there already and does not fit; replace it with --overwrite") from error
    if card.profiles != profiles or card.options != request.options:
        raise PpclError(f"{place.engine}: is there already with other profiles or options; replace it with --overwrite")
    return card


def _part(report: Report | None, index: int, count: int, name: str) -> Report | None:
    """Report one build as a part of all."""
    if report is None:
        return None

    def show(done: int, total: int, phase: str) -> None:
        report((100 * index + 100 * done // total) // count, 100, f"{name}: {phase}")

    return show
