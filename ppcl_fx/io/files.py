"""Reading and writing files: a killed run leaves no half-written result, and a bad file gets one clear line.

Everything is written beside its final name, flushed to disk and renamed. torch is imported only for tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from ppcl_fx.errors import OptionError, PpclError, near
from ppcl_fx.io.memory import size_words
from ppcl_fx.io.owned_folders import Kind, check_no_link, check_replaceable
from ppcl_fx.io.reading import BOM, JSON_BYTES, open_regular, os_errors, parse_json, read_bytes

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound=BaseModel)

ROOM = 64 * 2**20
"""Bytes of a disk that are left free."""


class Record(BaseModel):
    """A JSON file as a whole, or an entry of one: frozen, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def save(self, path: str | Path) -> None:
        """Write it as `write_json`."""
        write_json(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read such a file as `read_json`."""
        return read_json(path, cls)


class Sealed(BaseModel):
    """A JSON file that only this package writes: it holds the hash of all else in it, so a changed field is seen."""

    seal: str = ""
    """That hash while the file is on disk; empty in files of older versions, and where it was read."""

    @staticmethod
    def seal_of(document: Mapping[str, Any]) -> str:
        """Return the hash of all other entries of such a file, as they stand in it: those of other versions too."""
        plain = {name: value for name, value in document.items() if name != "seal"}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing a file of that name at once or not at all (see `new_file`)."""
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: BaseModel | Mapping[str, Any] | list[Any]) -> None:
    """Write a pydantic model, or anything that JSON knows, to `path` as `write_text` does; ValueError for NaN."""
    plain = obj.model_dump(mode="json") if isinstance(obj, BaseModel) else obj
    if isinstance(obj, Sealed) and isinstance(plain, dict):
        plain = {**plain, "seal": Sealed.seal_of(plain)}
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digests: bool = False,
) -> None:
    """Write tensors (any device, views and shared storage allowed) to a safetensors file, at once or not at all.

    The header has `metadata` beside them and, with `digests`, the digest of each tensor, for `ppcl-fx verify`.
    """
    from ppcl_fx.io.shards import write_long

    forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_file(path) as beside:
        beside.touch()  # an unwritable place fails here, with an OSError that says why
        write_long(beside, forms, tensors.__getitem__, metadata=metadata, digests=digests)


def read_json(path: str | Path, model: type[Model], limit: int = JSON_BYTES) -> Model:
    """Return the JSON file at `path`, of at most `limit` bytes, as a `model`.

    PpclError as `read_bytes`, or where it is no JSON or does not fit the model; the line names the first such field.
    """
    data = read_bytes(path, limit)
    try:
        document = parse_json(data)
        found = model.model_validate_json(data.removeprefix(BOM))
    except (OptionError, ValueError) as error:
        fault = f"not valid JSON ({error})"
        if isinstance(error, OptionError | ValidationError):
            fault = str(error) if isinstance(error, OptionError) else _first_fault(error, model)
        raise PpclError(f"{path}: {fault}; mend the file or write it again") from None
    if not isinstance(found, Sealed) or not found.seal:
        return found
    if found.seal != Sealed.seal_of(document):
        raise PpclError(f"{path}: was changed after it was written (its seal); make it again, or copy it again")
    return found.model_copy(update={"seal": ""})


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, memory-mapped, on the CPU; PpclError as `tensor_shapes`."""
    from safetensors.torch import load_file

    tensor_shapes(path)
    return load_file(path)


def tensor_shapes(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (safetensors dtype such as ``"BF16"``, shape), from the header alone: no tensor is read.

    PpclError where the file is missing, truncated or not safetensors.
    """
    open_regular(path).close()  # safetensors would wait for a pipe
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = f"truncated or not a safetensors file ({error})"
        raise PpclError(f"{path}: {reason}; write it again, or copy it again from where it came") from None


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """Return what the header of a safetensors file says beside its tensors."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def inside(folder: str | Path, name: str) -> Path:
    """Return ``folder/name``, refusing names that leave the folder (absolute, ``..``, a symbolic link out).

    One kind of link may leave it: in a cache of the Hugging Face hub, ``models--x--y/snapshots/REVISION/`` is made of
    links to files in ``models--x--y/blobs``.
    """
    folder = Path(folder)
    candidate = Path(name)
    plain = bool(candidate.parts) and not candidate.is_absolute() and ".." not in candidate.parts
    if not plain or "\0" in name or "\\" in name:
        raise PpclError(f"{folder}: the file name {name!r} leaves its folder; use a plain relative name")
    try:
        here, target = folder.resolve(), (folder / candidate).resolve()
        target.exists()  # a name may be too long for the file system, or be no text
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise PpclError(f"{folder / candidate}: cannot be followed ({error}); put the file itself there") from None
    if not target.is_relative_to(here) and target.parent != _blobs(here):
        raise PpclError(f"{folder / candidate}: a symbolic link out of {folder}; put the file itself there")
    return folder / candidate


def own_file(path: Path) -> Path:
    """Return a file that belongs to the folder it is in, refusing a link out of that (see `inside`)."""
    return inside(path.parent, path.name)


def check_links(folder: Path, patterns: Iterable[str] = ("*",)) -> None:
    """Refuse files directly in a folder that are links out of it: other libraries open its files by themselves."""
    for pattern in patterns if folder.is_dir() else ():
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink():
                own_file(path)


def _blobs(folder: Path) -> Path | None:
    """Where the files are that a snapshot in a cache of the hub consists of; None for other folders."""
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and re.match(r"(models|datasets|spaces)--.", repository.name):
            return repository / "blobs"
    return None


def check_writable(path: str | Path) -> None:
    """Refuse a folder that cannot be made, or written to where it exists; nothing is left behind."""
    place = next(one for one in (Path(path).absolute() / "x").parents if os.path.lexists(one))
    try:
        tempfile.TemporaryFile(dir=place, prefix=".ppcl-fx-").close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PpclError(f"{path}: cannot be written ({reason}: {place}); choose a writable place") from error


def need_room(folder: Path, size: int) -> None:
    """Raise PpclError where a disk has no room for `size` bytes more."""
    place = next(one for one in (folder.absolute() / "x").parents if one.exists())
    free = shutil.disk_usage(place).free
    if free < size + ROOM:
        lacks = f"the disk has {size_words(free)} free and {size_words(size + ROOM)} are needed"
        raise PpclError(f"{folder}: {lacks}; make room, or choose another place")


@contextmanager
def new_folder(path: str | Path, *, replaces: Kind | None = None, reads: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well, and else vanishes.

    Args:
        path: the folder; parents are made. One that exists, and is not empty, is a PpclError before any work is done.
        replaces: the kind of folder that is replaced all the same, at the end, in two renames, where
            `ppcl_fx.io.owned_folders.check_replaceable` allows it.
        reads: files and folders that the caller reads: no folder that holds one is replaced.
    """
    if replaces is not None:
        check_no_link(Path(path))
    final = Path(path).resolve()
    _check_free(final, replaces, reads)
    beside = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    old = final.parent / f".{final.name}.old-{uuid.uuid4().hex[:8]}"
    with _written(final):
        beside.mkdir(parents=True)
    try:
        yield beside
        with _written(final):
            for root, _, names in os.walk(beside):
                for file in (*(Path(root, name) for name in names), Path(root)):
                    if not file.is_symlink():
                        sync(file)
            _check_free(final, replaces, reads)
            if final.exists():
                final.rename(old)
            beside.rename(final)
            sync(final.parent)
            if old.exists():
                shutil.rmtree(old)
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        if beside.exists():
            shutil.rmtree(beside)


def _check_free(final: Path, replaces: Kind | None, reads: Iterable[str | Path]) -> None:
    with _written(final):
        if replaces is not None:
            check_replaceable(final, replaces, reads)
        elif final.exists() and not (final.is_dir() and not any(final.iterdir())):
            raise PpclError(f"{final}: already exists; choose another output, or remove it first")


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; when the block ends well that file becomes `path`, else it vanishes.

    An `OSError`, of the block too, becomes a PpclError: the place cannot be written.
    """
    path = Path(path)
    beside = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        if os.path.lexists(beside):
            beside.unlink()


def _written(path: Path) -> AbstractContextManager[None]:
    return os_errors(path, "cannot be written", "choose a writable place with room")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's content, in hexadecimal. Raises PpclError where it cannot be read."""
    with open_regular(path) as file, os_errors(path, "cannot be read", "copy it again"):
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_fault(error: ValidationError, model: type[BaseModel]) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "the whole file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    guess = ""
    if fault["type"] == "extra_forbidden":
        schema = model.model_json_schema()
        parts = [schema, *schema.get("$defs", {}).values()]
        guess = near(str(fault["loc"][-1]), {name for part in parts for name in part.get("properties", {})})
    return f"{where}: {fault['msg'].lower()}{guess}{more}"
