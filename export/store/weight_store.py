"""Where the weights of exported graphs lie: the student's own files where possible, else one shared copy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import FileMark, WeightFile, mark_of
from ppcl_fx.export.store.names import DATA, WEIGHTS
from ppcl_fx.export.store.publish import is_store, writing
from ppcl_fx.export.store.weight_source import WeightPiece, WeightSource
from ppcl_fx.export.verify.integrity import cards_in, sample_of, used_by_others
from ppcl_fx.io.files import inside, need_room, sha256_of, sync
from ppcl_fx.io.memory import size_words
from ppcl_fx.io.reading import open_regular
from ppcl_fx.io.shards import Form, Stored, form_bytes, stored_tensors, write_long


@dataclass(frozen=True)
class Store:
    """Where each tensor lies, in files within the folder of the graphs.

    What the manifests in `replaced` name need not stay in the end. `created` are files that this export made, and
    `reading` are digests in the making, by name within the folder.
    """

    folder: Path
    replaced: Collection[str]
    ranges: dict[str, Stored] = field(default_factory=dict)
    created: list[Path] = field(default_factory=list)
    reading: dict[str, Future[FileMark]] = field(default_factory=dict)

    def place(self, piece: WeightPiece) -> tuple[str, int, torch.dtype]:
        """Return the file of a piece, as graphs name it; its first byte there; its dtype."""
        where = self.ranges[piece.name]
        return self.name(where.file), where.offset + piece.first * where.dtype.itemsize, where.dtype

    def place_of_rows(self, name: str, first: int, count: int) -> tuple[str, int, int]:
        """Return the file of some rows of a stored tensor, their first byte there, and how many bytes they are."""
        where = self.ranges[name]
        row = where.nbytes // where.shape[0]
        return self.name(where.file), where.offset + first * row, count * row

    def name(self, file: Path) -> str:
        """Return what graphs call a file: its path within the folder, with slashes."""
        return file.relative_to(self.folder).as_posix()

    def described(self, name: str) -> WeightFile:
        """Return what a manifest says of a file."""
        path = self.folder / name
        mark = self.reading[name].result() if name in self.reading else mark_of(path)
        return WeightFile(file=name, sha256=mark.sha256, size=mark.bytes, sample=sample_of(path))

    @contextmanager
    def digesting(self) -> Iterator[None]:
        """Read the files in the background meanwhile: `described` then has less to wait for."""
        names = dict.fromkeys(self.name(where.file) for where in self.ranges.values())
        pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="digest")
        try:
            self.reading.update({name: pool.submit(mark_of, self.folder / name) for name in names})
            yield
        finally:
            pool.shutdown(cancel_futures=True)

    def home(self, target: Path, sha256: str) -> Path:
        """Return where content lies already, or else where it may go: never over what a graph uses."""
        aside = target.with_name(f"{target.stem}-{sha256[:8]}{target.suffix}")
        for path in (target, aside):
            if _holds(path, sha256):
                return path
        if not target.exists():
            return target
        holder = used_by_others(self.folder, self.name(target), self.replaced)
        if holder is not None:
            raise PpclError(
                f"{target}: holds other weights, and {holder} uses them; choose another folder, or remove that file"
            )
        return aside if used_by_others(self.folder, self.name(target), ()) else target

    def publish(self, target: Path, write: Callable[[Path], None]) -> Path:
        """Write a file beside its name, rename it, and return where it lies; one of the same content stays as it is."""
        beside = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                write(beside)
                sync(beside)
                content = sha256_of(beside) if _taken(target) else None
                home = target if content is None else self.home(target, content)
                if content is None or not _holds(home, content):
                    if not home.exists():
                        self.created.append(home)
                    os.replace(beside, home)
                    sync(home.parent)
        finally:
            beside.unlink(missing_ok=True)
        return home


@contextmanager
def stored(
    source: WeightSource,
    needed: Collection[str],
    folder: Path,
    replaced: Collection[str],
    note: Callable[[str], None],
) -> Iterator[Store]:
    """Make the weights of a model available to graphs in a folder; where the block fails, what nobody uses goes again.

    A file that lies in the folder or in one of its subfolders, as a file of its own, is used where it is. Others are
    copied to ``weights/``, for all graphs once: runtimes refuse links and what lies outside. So are tensors that are
    not stored in the dtype in which they are wanted, and those of a model in memory. A copy whose name is taken by
    weights that a graph to be replaced still uses gets another name: that graph stays whole until it is replaced.

    Args:
        needed: names of the tensors that some graph uses.
        folder: the folder of the graphs; exists.
        replaced: manifests that are about to be replaced.
        note: told in one line what was copied, and why.
    """
    root = folder.resolve()
    forms = source.forms()
    there = {name: at for name, at in source.ranges.items() if forms.get(name) == (at.dtype, at.shape)}
    targets = {at.file: _target(at.file, source.folder, root) for name, at in there.items() if name in needed}
    others = {name: form for name, form in forms.items() if name not in there}
    if others.keys().isdisjoint(needed):
        others = {}
    copied = {file: target for file, target in targets.items() if target != file.resolve()}
    if (copied or others) and not is_store(root / WEIGHTS):
        raise PpclError(f"{root / WEIGHTS}: holds other files than weights of exports; choose another folder")
    made = Store(root, replaced)
    digests = {file: sha256_of(file) for file, target in copied.items() if _taken(target)}
    homes = {file: made.home(copied[file], digest) for file, digest in digests.items()}
    lacking = [file for file in copied if file not in homes or not _holds(homes[file], digests[file])]
    need_room(root, form_bytes(others) + sum(file.stat().st_size for file in lacking))
    targets |= homes
    try:
        for file in lacking:
            targets[file] = made.publish(copied[file], partial(_clone, file.resolve()))
        if others:
            sizes: Counter[torch.dtype] = Counter()
            for name, form in others.items():
                sizes[form[0]] += form_bytes({name: form})
            main = sizes.most_common(1)[0][0]  # the dtype of most bytes
            few = source.quantised
            kind = few.scheme.weights if few is not None else str(main).removeprefix("torch.")
            target = root / WEIGHTS / f"{kind}.safetensors"
            made.ranges.update(stored_tensors(made.publish(target, partial(_convert, source, others))))
        made.ranges.update(
            {name: replace(at, file=targets[at.file]) for name, at in there.items() if at.file in targets}
        )
        _say(source, copied, others, root, note)
        with made.digesting():
            yield made
    except BaseException:
        for path in made.created:
            if used_by_others(root, made.name(path), ()) is None:  # a graph that is done stays whole
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            prune(root / WEIGHTS)
        raise


def _target(file: Path, origin: Path | None, root: Path) -> Path:
    """Return where a file is used: where it is, if runtimes take it there, else in the store."""
    real = file.resolve()
    if real.is_relative_to(root) and _alone(file):
        return real
    within = origin is not None and file.is_relative_to(origin)
    return root / WEIGHTS / (file.relative_to(origin) if within and origin is not None else Path(file.name))


def _alone(file: Path) -> bool:
    """Tell whether a file is no link of either kind: runtimes refuse those."""
    return not file.is_symlink() and file.stat().st_nlink == 1


def _holds(path: Path, sha256: str) -> bool:
    """Tell whether a file has a content, and is one that runtimes take."""
    return path.is_file() and _alone(path) and mark_of(path).sha256 == sha256


def _taken(target: Path) -> bool:
    """Tell whether there is a file of this name, or one that was put aside because there was."""
    return target.exists() or any(target.parent.glob(f"{target.stem}-????????{target.suffix}"))


def _clone(source: Path, target: Path) -> None:
    """Copy a file within the kernel, which shares its blocks where the file system can; by hand where it cannot."""
    with open_regular(source) as old, target.open("wb") as new:
        left = os.fstat(old.fileno()).st_size
        try:
            while left and (count := os.copy_file_range(old.fileno(), new.fileno(), min(left, 1 << 30))):
                left -= count
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise  # not that the kernel cannot, but that nobody can
            old.seek(0)
            new.seek(0)
            shutil.copyfileobj(old, new, 1 << 22)
            return
    if left:
        raise PpclError(f"{source}: became shorter while it was copied; copy it again from where it came")


def _convert(source: WeightSource, forms: dict[str, Form], path: Path) -> None:
    """Write tensors in the dtypes that they are wanted in, one at a time."""
    try:
        write_long(path, forms, lambda name: source.read(name).to(forms[name][0]), lambda _: source.release())
    finally:
        source.release()


def _say(
    source: WeightSource, copied: Collection[Path], others: Collection[str], root: Path, note: Callable[[str], None]
) -> None:
    """Say why there is a copy, in one line each."""
    if copied:
        size = size_words(sum(file.stat().st_size for file in copied))
        linked = any(file.is_symlink() or file.resolve().stat().st_nlink > 1 for file in copied)
        why = "runtimes refuse links" if linked else "they lie outside of this folder, and runtimes refuse that"
        note(f"{len(copied)} weight files ({size}) were copied to {root / WEIGHTS}: {why}")
    if others and source.ranges:
        note(f"{len(others)} weights were converted, once for all ratios, into {root / WEIGHTS}")


def weights_of(folder: Path, manifests: Collection[str]) -> set[str]:
    """Return the weight files that manifests of a folder name."""
    return {one.file for name, found in cards_in(folder).items() if name in manifests for one in found.weights}


def drop_unused(folder: Path, names: Collection[str]) -> None:
    """Remove those of some weight files that exports wrote and no manifest names; a student's own files stay."""
    kept = weights_of(folder, list(cards_in(folder)))
    ours = is_store(folder / WEIGHTS)
    # What an export that ended early replaced is named by no manifest any more.
    files = {path.relative_to(folder).as_posix() for path in (folder / WEIGHTS).rglob("*") if path.is_file()}
    families = {_family(name) for name in {*names, *kept}}
    for name in sorted({*names, *(file for file in files if _family(file) in families)} - kept):
        first = PurePosixPath(name).parts[0]
        if (first == WEIGHTS and ours) or (first == name and name.endswith(DATA)):
            inside(folder, name).unlink(missing_ok=True)
    if ours:
        prune(folder / WEIGHTS)


def _family(name: str) -> str:
    """Return the name that a file would have if it had not been put aside (`Store.home`)."""
    return re.sub(r"-[0-9a-f]{8}(?=\.safetensors$)", "", name)


def prune(folder: Path) -> None:
    """Remove the empty folders in a folder, and itself where nothing else is there."""
    for path in sorted((folder, *folder.rglob("*")), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
