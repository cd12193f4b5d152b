"""Everything of a folder read to the last byte, and compared with what was written down of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ppcl_fx.calls.store import Calls
from ppcl_fx.errors import PpclError
from ppcl_fx.formats.components import check_component, is_model, open_weights
from ppcl_fx.formats.layout import open_layout
from ppcl_fx.formats.pruned import PRUNED, Pruned
from ppcl_fx.io.files import inside, read_json, sha256_of
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.io.shards import AGAIN, Shards, check_weight
from ppcl_fx.model.pluggable import STUDENTS, TEACHER
from ppcl_fx.model.sources import is_released, open_source, transformer_folder
from ppcl_fx.model.student_folder import FinetunedFolder, StudentFolder
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.curves import LOSSES, Losses
from ppcl_fx.schema.measured_effects import EFFECTS, load_effects
from ppcl_fx.train.core.checkpoints import read


@dataclass(frozen=True)
class Checked:
    """A part of a folder that is whole: its place, what it is, and what it was compared with, in words."""

    path: Path
    what: str
    compared: str


def verify(folder: str | Path) -> list[Checked]:
    """Read everything that this package, or diffusers, wrote into a folder and the folders in it.

    Raises:
        PpclError: the first thing that is missing or damaged, by its file and tensor; or nothing here is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give a folder that ppcl-fx or diffusers wrote")
    found = list(_walk(folder))
    if not found:
        raise PpclError(f"{folder}: holds nothing that ppcl-fx or diffusers wrote; give a student, engines or calls")
    return found


def _walk(folder: Path) -> Iterator[Checked]:
    done: set[str] = set()
    for sign, check, covered in (
        ("ppcl.json", _student, {"teacher"}),
        ("finetuned.json", _finetuned, set()),
        ("keep-*.json", _engines, {"weights"}),
        ("head.json", _engines, {"weights"}),
        ("index.json", _calls, set()),
        ("SHA256SUMS", _checkpoint, {"tensors"}),
        ("analysis.json", _analysis, set()),
        ("losses.json", _losses, set()),
        ("model_index.json", _pipeline, {path.name for path in folder.iterdir() if path.is_dir()}),
        ("config.json", _transformer, set()),
    ):
        if check.__name__ not in done and any(folder.glob(sign)):
            done |= {check.__name__, *covered}
            yield from check(folder)
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in done):
        if place.resolve().is_relative_to(folder.resolve()):  # or a link could lead round and round
            yield from _walk(place)


def _student(folder: Path) -> Iterator[Checked]:
    opened = StudentFolder.open(folder)
    opened.release()
    yield Checked(folder, "student", "plan, teacher's fingerprint, traced call")
    yield _weights(folder / TEACHER, "teacher's weights", opened.teacher.shards)
    yield _weights(folder / STUDENTS, "students' weights", opened.students)
    if (folder / EFFECTS).exists():
        weights = {name: opened.students.tensor(name) for name in opened.students.stored}
        same = load_effects(folder, opened.model.plan, weights) is not None
        stale = "plan; they were measured before the last training"
        yield Checked(folder / EFFECTS, "effects", "plan, students" if same else stale)
    opened.release()


def _finetuned(folder: Path) -> Iterator[Checked]:
    yield _weights(folder, "fine-tuned model", Shards.one_file(FinetunedFolder.open(folder).file))


def _engines(folder: Path) -> Iterator[Checked]:
    from ppcl_fx.export.runtime.folder import artefacts
    from ppcl_fx.export.runtime.model_spec import (
        MODEL_SPEC,
        check_model_spec,
        pluggable_graph,
        read_model_spec,
    )
    from ppcl_fx.export.store.names import manifest_path
    from ppcl_fx.export.tensorrt.manifest import EngineManifest
    from ppcl_fx.export.verify.integrity import check_artefacts

    ratios = artefacts(folder)
    for card in check_artefacts(folder):
        yield Checked(folder / card.file, "graph", f"sha256 of it and of {len(card.weights)} weight files")
    for graph in sorted(folder.glob("keep-*.onnx")):
        if not manifest_path(graph).is_file():
            yield Checked(graph, "graph without its manifest", "nothing: no export finished it, and it is not used")
    if (folder / MODEL_SPEC).is_file():
        spec = read_model_spec(folder)
        for one in ratios.values():
            check_model_spec(spec, one.manifest, folder)
        pluggable_graph(spec, torch.float32, folder, [one.manifest for one in ratios.values()])
        yield Checked(folder / MODEL_SPEC, "model spec", "plans of the graphs, traced call")
    for path in sorted(folder.glob("*.engine.json")):
        engine = read_json(path, EngineManifest)
        if sha256_of(inside(folder, engine.file)) != engine.engine.sha256:
            raise PpclError(f"{folder / engine.file}: its content is not what was written (sha256); build it again")
        yield Checked(folder / engine.file, "engine", "sha256")


def _calls(folder: Path) -> Iterator[Checked]:
    calls = Calls.open(folder)
    yield Checked(folder, "calls", f"sha256 of every tensor of {len(calls)} calls, and of all of them")


def _checkpoint(folder: Path) -> Iterator[Checked]:
    found = read(folder)
    yield Checked(folder, "checkpoint", f"sha256 of every file, {len(found.tensors)} tensors")


def _analysis(folder: Path) -> Iterator[Checked]:
    path, calls = folder / "analysis.json", folder / "calls"
    found = Redundancy.load(path)
    beside = (calls / "index.json").is_file()
    if beside and Calls.open(calls, check=False).fingerprint != found.calls:
        raise PpclError(f"{path}: made from other calls than those in {calls}; analyse them again")
    yield Checked(path, "analysis", "its seal" + (", the calls' fingerprint" if beside else ""))


def _losses(folder: Path) -> Iterator[Checked]:
    Losses.open(folder / LOSSES)
    yield Checked(folder / LOSSES, "losses", "nothing beside its form")


def _pipeline(folder: Path) -> Iterator[Checked]:
    source = open_source(str(folder))
    yield from _transformer(transformer_folder(folder))
    for name, kind in source.parts().items():
        if is_model(kind):
            yield _weights(folder / name, name, open_weights(kind, folder / name))
        else:
            check_component(kind, folder / name)
            yield Checked(folder / name, name, f"types of {kind.__name__}")


def _transformer(folder: Path) -> Iterator[Checked]:
    if (folder / PRUNED).is_file():
        read_json(folder / PRUNED, Pruned)
    if is_released(folder):
        open_layout(folder)
        yield _weights(folder, "transformer of the released layout", Shards.open(folder))
    else:
        yield _weights(folder, "transformer", open_source(str(folder)).checkpoint().shards)


def _weights(path: Path, what: str, shards: Shards) -> Checked:
    """Read every tensor: it is finite, and it is the one that was stored where that was written down."""
    digests = shards.digests()
    lost = sorted(set(digests) - set(shards.stored))
    if lost:
        raise PpclError(f"{path}: the digests name {lost[0]}, which is not there; {AGAIN}")
    for name, entry in shards.stored.items():
        tensor = shards.tensor(name)
        check_weight(tensor, name, entry.file)
        if name in digests and tensor_digest(tensor) != digests[name]:
            raise PpclError(f"{entry.file}: {name} is not what was written (sha256); {AGAIN}")
    shards.close()
    count = f"{len(shards.stored):,} tensors, all finite"
    if len(digests) == len(shards.stored):
        return Checked(path, what, f"{count}, sha256 of each")
    return Checked(path, what, f"{count}; no digest stored for {len(shards.stored) - len(digests):,} of them")
