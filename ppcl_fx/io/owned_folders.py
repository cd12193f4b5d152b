"""The kinds of folders that this package writes: whoever writes a new file into one of them adds its name here.

Only a folder of a known kind, with nothing else in it and nothing that is being read, is ever replaced or removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ppcl_fx.errors import PpclError

MOST_BYTES = 256 * 2**20
"""A manifest that is longer is not one of ours."""
NEAR = 4096
"""Bytes at each end of a file in which its mark is looked for."""
REPORT_MARK = b"Made by ppcl-fx."
OPTIONS_MARK = b"options of `ppcl-fx train`"
GRAPH_MARK = b"ppcl-fx"
_LEFT_BEHIND = re.compile(r"\..+\.partial(-[0-9a-f]{8}.*)?|\.speed-[0-9a-f]{8}")
"""What a killed run leaves: it has no name yet."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder, and what a person calls it.

    Attributes:
        files: patterns of the names of its files.
        folders: patterns of the names of the folders in it, with their kinds.
        manifest: the JSON file that tells the kind; None for folders that the names alone tell.
        keys: fields that the manifest has at least; those of `says` have one value.
    """

    words: str
    files: tuple[str, ...] = ()
    folders: Mapping[str, Kind] = field(default_factory=dict)
    manifest: str | None = None
    keys: tuple[str, ...] = ()
    says: Mapping[str, object] = field(default_factory=dict)

    def joined(self, *others: Kind) -> Kind:
        """Return this kind, with what may lie in others lying in it too."""
        folders = {name: kind for one in (self, *others) for name, kind in one.folders.items()}
        return replace(self, files=tuple(file for one in (self, *others) for file in one.files), folders=folders)


_NUMBER = r"\d+(\.\d+)?(e-?\d+)?"
_SAFETENSORS = r".+\.safetensors"

_SHARDS = Kind("recorded calls", (r"index\.json", r"calls-\d{5}\.safetensors"))
CALLS = replace(_SHARDS, manifest="index.json", keys=("model", "fingerprint", "calls"))
_PARTS = Kind("the parts of a checkpoint", (r"shard-\d{5}-.+\.safetensors", r"\.metadata", r".+\.index\.json"))
CHECKPOINT = Kind("a checkpoint", (r"state\.(json|safetensors)|pieces\.json|SHA256SUMS",), {"tensors": _PARTS})
CHECKPOINTS = Kind("checkpoints", (), {r"\d{2}-\d{8}": CHECKPOINT})
_EVENTS = Kind("TensorBoard events", (), {".+": Kind("events", (r"events\.out\.tfevents\..+",))})
LOGS = Kind("logs of a training", (r"log\.jsonl",), {"tensorboard": _EVENTS})
WEIGHTS = Kind("weights of exports", (_SAFETENSORS,), {".+": Kind("weights of exports", (_SAFETENSORS,))})
ENGINES = Kind(
    "exported engines",
    (
        rf"keep-{_NUMBER}(\.bf16)?\.(onnx|json|onnx\.data|engine|engine\.json|engine\.cache)",
        r"head\.json|build\.json|build\.sh|timing\.cache|\.exporting",
    ),
    {"weights": WEIGHTS},
)
_TUNED = Kind("a fine-tuned model", (r"finetuned\.json", r"model\.safetensors"), manifest="finetuned.json")
FINETUNED = replace(_TUNED, keys=("plan", "students", "params", "keep")).joined(ENGINES)
STATES = Kind("values of calls", (), {r"\d{4}": Kind("values at a cut", (r"\d{6}\.safetensors",))})
BOUNDED = Kind(
    "a training in bounded memory",
    (r"run\.json",),
    {
        "cache": Kind("a cache", (r"cache\.json",), {r"\d{6}": Kind("a call", (_SAFETENSORS, r".+\.json"))}),
        "states": STATES,
        "done": Kind("trained students", (_SAFETENSORS, r".+\.json")),
        "checkpoints": Kind("checkpoints of students", (), {".+": CHECKPOINTS}),
    },
)
RUNS = Kind("runs of a part", (), {r"\d+": _SHARDS})
_PART = Kind("a part", (r"part\.json",), {"calls": _SHARDS})
RECORDED = Kind("recorded parts", (), {r"part-\d{5}": _PART, r"part-\d{5}\.runs": RUNS})
ENCODED_PART = Kind("encoded pictures", (r"samples\.json",), {"calls": _SHARDS})
TRAINING = Kind(
    "a training",
    (r"losses\.json", r"train\.toml", r"report\.html"),
    {
        "checkpoints": CHECKPOINTS,
        "logs": LOGS,
        rf"finetuned(-{_NUMBER})?": FINETUNED,
        "bounded": BOUNDED,
        "recorded": RECORDED,
        "encoded": Kind("a cache of pictures", (r"template\.json",), {"[0-9a-f]{32}": ENCODED_PART}),
    },
)
_TEACHER = Kind("a transformer", (r"config\.json", r".+\.safetensors\.index\.json", _SAFETENSORS))
SAVED = Kind(
    "a saved pluggable model",
    (r"ppcl\.json", r"plan\.json", r"students\.safetensors", r"effects\.json", r"README\.md"),
    {"teacher": _TEACHER},
    manifest="ppcl.json",
    keys=("plugged", "example", "made"),
    says={"kind": "pluggable"},
)
STUDENT = SAVED.joined(TRAINING, ENGINES)
PRUNED = Kind(
    "a pruned model",
    (r"config\.json", r"pruned\.json", r"diffusion_pytorch_model\.safetensors"),
    manifest="pruned.json",
    keys=("plan", "kept", "params"),
    says={"kind": "pruned"},
)
PRUNED_RATIOS = Kind("pruned models of several ratios", (), {rf"keep-{_NUMBER}": PRUNED})
ANALYSING = Kind(
    "an unfinished analysis",
    (r"progress\.json",),
    {
        "results": Kind("results", (r"\d{4}\.json",)),
        "probes": Kind("probes", (r"\d{4}\.safetensors",)),
        "kept": Kind("activations", (r".+\.bin",)),
        "curves": Kind("curves", (_SAFETENSORS,)),
        "states": STATES,
    },
)
PICTURES = Kind("a sheet of pictures", (r"grid\.png",))
PIPELINE = Kind(
    "a pipeline that teaching wrote",
    (r"model_index\.json",),
    {".+": Kind("a part of a pipeline", (r".+\.json", _SAFETENSORS))},
    manifest="model_index.json",
    says={"_class_name": "ShapesPipeline"},
)
DEMO = Kind(
    "a demo",
    (r"demo\.json", r"analysis\.json", r"plan\.json", r"report\.html", r"summary\.json"),
    {
        "calls": CALLS, "student": STUDENT, "train": TRAINING, "engines": ENGINES,
        "engines-finetuned": ENGINES, "engines-int8": ENGINES, "engines-int4": ENGINES, "pictures": PICTURES,
    },
    manifest="demo.json",
    says={"kind": "demo"},
)


def check_replaceable(folder: Path, kind: Kind, reads: Iterable[str | Path] = ()) -> None:
    """Refuse to replace a folder that this package did not write, that holds anything else, or that is being read.

    A folder that is not there, or is empty, may be replaced. A link is followed; names in `reads` may be of nothing.
    """
    folder = folder.resolve()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise PpclError(f"{folder}: is a file, and a folder is to be written there; choose another output")
    for place in (Path.cwd(), Path.home()):
        if place.resolve().is_relative_to(folder):
            raise PpclError(f"{folder}: holds {place}, so it is not replaced; choose another output")
    mine = set(_identities(folder))
    for read in reads:
        if not mine.isdisjoint(_chain(Path(read))):
            raise PpclError(f"{folder}: {read} is read and lies there, so it is not replaced; choose another output")
    odd = foreign(folder, kind)
    if odd is not None:
        raise PpclError(f"{folder}: {odd}, so it is not replaced; choose another output, or move it away yourself")


def check_no_link(path: Path) -> None:
    """Refuse a link where something is to be replaced: what it leads to may be another's."""
    if path.is_symlink():
        raise PpclError(f"{path}: a link to {path.readlink()}, so it is not replaced; put what it leads to there")


def discard(folder: Path, kind: Kind) -> None:
    """Remove a folder of ours, if it is there; PpclError, and nothing is removed, where it may not be replaced."""
    check_no_link(folder)
    check_replaceable(folder, kind)
    if folder.exists():
        shutil.rmtree(folder)


def check_file(path: Path, *, mark: bytes = b"", keys: Iterable[str] = ()) -> None:
    """Refuse to replace a file, but an empty one, without `mark` near an end, or that is no JSON with `keys`."""
    check_no_link(path)
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    if not path.is_file() or (not _marked(path, mark) if mark else not says(path, {}, keys)):
        raise PpclError(f"{path}: ppcl-fx did not write it, so it is not replaced; choose another output, or move it")


def _marked(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        ends = file.read(NEAR)
        file.seek(max(0, path.stat().st_size - NEAR))
        return mark in ends or mark in file.read(NEAR)


def foreign(folder: Path, kind: Kind) -> str | None:
    """Return, in words, the first thing by which a folder is not one of a kind; None where it is one."""
    if not _told(folder, kind):
        return f"no {kind.manifest} there says that ppcl-fx wrote {kind.words}"
    return next(_strangers(folder, folder, kind), None)


def _told(folder: Path, kind: Kind) -> bool:
    return kind.manifest is None or says(folder / kind.manifest, kind.says, kind.keys)


def _strangers(root: Path, folder: Path, kind: Kind) -> Iterator[str]:
    for place in sorted(folder.iterdir()):
        name = place.relative_to(root).as_posix()
        inner = next((k for pattern, k in kind.folders.items() if re.fullmatch(pattern, place.name)), None)
        if place.is_symlink():
            yield f"holds {name}, a link that ppcl-fx did not write"
        elif _LEFT_BEHIND.fullmatch(place.name):
            continue
        elif place.is_dir() and inner is not None:
            if any(place.iterdir()) and not _told(place, inner):
                yield f"holds {name}, where no {inner.manifest} says that ppcl-fx wrote {inner.words}"
            else:
                yield from _strangers(root, place, inner)
        elif not place.is_file() or not any(re.fullmatch(pattern, place.name) for pattern in kind.files):
            yield f"holds {name}, which ppcl-fx did not write there"


def says(path: Path, values: Mapping[str, object], keys: Iterable[str] = ()) -> bool:
    """Tell whether a file, and no link, is a JSON object with certain values, and certain fields at least."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
            return False
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(found, dict)
        and all(key in found for key in keys)
        and all(found.get(key) == value for key, value in values.items())
    )


def _identities(folder: Path) -> Iterator[tuple[int, int]]:
    """The device and number of a folder and of everything in it: the same by whatever path they are reached."""
    for root, _, files in os.walk(folder):
        yield from map(_identity, (Path(root), *(Path(root, name) for name in files)))


def _chain(path: Path) -> Iterator[tuple[int, int]]:
    """The same of what is read and of all folders above it, by the path as given and without its links."""
    for one in {path.absolute(), path.resolve()}:
        yield from (_identity(place) for place in (one, *one.parents) if place.exists())


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat() if path.is_symlink() else path.stat()
    return found.st_dev, found.st_ino
