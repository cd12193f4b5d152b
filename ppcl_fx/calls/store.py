"""Calls: recorded inputs of a transformer, in memory or as safetensors shards with a JSON index."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from pydantic import Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer
from pydantic.types import StrictBool, StrictFloat, StrictInt, StrictStr

from ppcl_fx.calls.collate import AGAIN, Call, check_finite, collate, map_tensors
from ppcl_fx.calls.kinds import Examples, Sizes, kind_of, shapes_of
from ppcl_fx.errors import PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import Record, inside, new_folder, read_json, write_json, write_safetensors
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.io.reading import INDEX_BYTES
from ppcl_fx.io.shards import Shards

__all__ = ["Call", "Calls", "check_finite", "collate", "map_tensors"]

INDEX = "index.json"
SHARD_BYTES = 256 * 2**20
"""A shard is closed once it holds this many bytes."""
OUTPUT = "(output)"  # stands for the output among a call's arguments; none can be called so


class TensorRef(Record):
    """A tensor: where it lies, its shape, and the hash of its dtype, shape and bytes."""

    kind: Literal["tensor"] = "tensor"
    shard: str
    name: str
    shape: list[int]
    sha256: str

    @model_serializer(mode="wrap")
    def _placed(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Leave out the place where the context says so: for a fingerprint what the tensor holds counts alone."""
        return {name: value for name, value in dump(self).items() if name not in (info.context or ())}


class Items(Record):
    """A list or a tuple."""

    kind: Literal["list", "tuple"]
    items: list[Value]


class Entries(Record):
    """A dict with names as keys."""

    kind: Literal["dict"] = "dict"
    entries: dict[str, Value]


Value = StrictBool | StrictInt | StrictFloat | StrictStr | TensorRef | Items | Entries | None
Items.model_rebuild()
Entries.model_rebuild()


class CallEntry(Record):
    """One call in the index; the fields are those of `Call`. Older folders have no `output`."""

    prompts: list[str]
    timestep: float
    index: int
    batch: int
    branch: int
    kwargs: dict[str, Value]
    output: TensorRef | None = None

    def head(self, kwargs: dict[str, Any], output: torch.Tensor | None) -> Call:
        """Return the call, with these arguments and output."""
        return Call(kwargs, tuple(self.prompts), self.timestep, self.index, self.batch, self.branch, output)

    def tensors(self) -> list[tuple[str, TensorRef]]:
        """Return every tensor of the call with the name of the argument it belongs to."""
        found: list[tuple[str, TensorRef]] = []
        for name, spec in [*self.kwargs.items(), (OUTPUT, self.output)]:
            refs: list[TensorRef] = []
            _value(spec, refs.append)
            found += [(name, ref) for ref in refs]
        return found


class Index(Record):
    """What ``index.json`` holds, `ones` as in `Calls`: older folders have none."""

    version: Literal[1] = 1
    model: str
    fingerprint: str
    calls: list[CallEntry]
    ones: dict[str, list[StrictInt | tuple[StrictStr, StrictInt]]] = Field(default_factory=dict)


class Calls(Sequence[Call]):
    """The calls of one transformer, in the order in which they were made.

    Args:
        calls: the calls.
        model: the fingerprint of the transformer, see `ppcl_fx.io.fingerprint`.
        ones: the arguments for which the transformer takes ones where a call lacks them, see `ppcl_fx.calls.kinds`.
    """

    def __init__(self, calls: Sequence[Call], model: str = "", ones: Mapping[str, Sizes] | None = None) -> None:
        self.model, self.ones, self._calls = model, dict(ones or {}), calls
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """The hash (sha256) of the model's fingerprint and of all calls, tensors and prompts included."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.model, _entries(self._calls, _ref))
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Calls: ...
    def __getitem__(self, index: int | slice) -> Call | Calls:
        """Return one call, or, for a slice, the calls in it; each keeps its `index`."""
        if isinstance(index, slice):
            return Calls([self._calls[i] for i in range(*index.indices(len(self)))], self.model, self.ones)
        return self._calls[index]

    def examples(self) -> Examples:
        """Return the arguments of a call, the first of the kind with the most, and what there is of other kinds.

        They are the example inputs for tracing: `ppcl_fx.trace` can make one graph for all.
        """
        if not self._calls:
            raise PpclError("there are no calls to take an example from; record at least one prompt")
        first: dict[Any, int] = {}
        shapes = {}
        for index, kwargs in enumerate(self._given()):
            first.setdefault(kind_of(kwargs), index)
            shapes[frozenset(shapes_of(kwargs).items())] = shapes_of(kwargs)
        fullest, *others = (self._calls[first[kind]].kwargs for kind in sorted(first, key=len, reverse=True))
        return Examples(fullest, others, list(shapes.values()), self.ones)

    def _given(self) -> Iterator[Mapping[str, Any]]:
        """Yield each call's arguments; of saved calls no tensor is read, and what stands for it has its shape."""
        if isinstance(self._calls, _StoredCalls):
            return (_value(Entries(entries=entry.kwargs), lambda ref: ref) for entry in self._calls.entries)
        return (call.kwargs for call in self._calls)

    def heads(self) -> list[Call]:
        """Return the calls without arguments and outputs; of saved calls nothing is read."""
        if isinstance(self._calls, _StoredCalls):
            return [entry.head({}, None) for entry in self._calls.entries]
        return [replace(call, kwargs={}, output=None) for call in self._calls]

    def save(self, folder: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the calls to a new folder: shards of about `shard_bytes`, equal tensors once, and ``index.json``.

        PpclError where there are no calls, one of them holds NaN, or the folder exists or cannot be written.
        """
        if not self._calls:
            raise PpclError(f"{folder}: there are no calls to save; record at least one prompt")
        with new_folder(folder, replaces=owned.CALLS if overwrite else None) as new:
            shards = _ShardWriter(new, shard_bytes)
            entries = _entries(self._calls, shards.add)
            shards.flush()
            self._fingerprint = _fingerprint(self.model, entries)
            index = Index(model=self.model, fingerprint=self._fingerprint, calls=entries, ones=self.ones)
            write_json(new / INDEX, index)

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = True) -> Calls:
        """Open saved calls; tensors stay on disk, memory-mapped, until a call is asked for.

        Names, shapes and file lengths are always compared with the index. With `check`, every tensor is
        also read once: a changed byte, NaN and infinity are found here, not in the middle of a training.
        The PpclError names the file and the call.
        """
        folder = Path(folder)
        index = read_json(inside(folder, INDEX), Index, INDEX_BYTES)
        stored = _StoredCalls(folder, index.calls)
        stored.check_headers()
        if _fingerprint(index.model, index.calls) != index.fingerprint:
            raise PpclError(f"{folder / INDEX}: was changed after it was written; {AGAIN}")
        if check:
            stored.check_values()
        calls = cls(stored, index.model, index.ones)
        calls._fingerprint = index.fingerprint
        return calls


def hold_out(calls: Sequence[Call], share: float, seed: int) -> list[int]:
    """Return the positions of the calls to hold out, in order: about a share of two or more, and never all.

    A function of the calls' prompts, the share and the seed alone. Calls of the same prompts stay on one side where
    there are prompts enough: what they share would make the result too good.
    """
    together: dict[Any, list[int]] = {}
    for index in range(len(calls)):
        together.setdefault(calls[index].prompts, []).append(index)
    if len(together) * share < 1:
        together = {index: [index] for index in range(len(calls))}
    parts = random.Random(f"ppcl-fx held out {seed}").sample(list(together.values()), len(together))
    count = min(len(parts) - 1, max(1, round(len(parts) * share)))
    return sorted(index for part in parts[:count] for index in part)


def _spec(value: Any) -> Value:
    """The index's form of an argument whose tensors are already references."""
    if isinstance(value, list | tuple):
        return Items(kind="tuple" if isinstance(value, tuple) else "list", items=[_spec(v) for v in value])
    if isinstance(value, dict):
        return Entries(entries={key: _spec(v) for key, v in value.items()})
    scalar: Value = value
    return scalar


def _value(spec: Value, read: Callable[[TensorRef], Any]) -> Any:
    if isinstance(spec, TensorRef):
        return read(spec)
    if isinstance(spec, Items):
        items = [_value(item, read) for item in spec.items]
        return tuple(items) if spec.kind == "tuple" else items
    if isinstance(spec, Entries):
        return {key: _value(item, read) for key, item in spec.entries.items()}
    return spec


def _ref(name: str, tensor: torch.Tensor, sha256: str, shard: str = "") -> TensorRef:
    return TensorRef(shard=shard, name=name, shape=list(tensor.shape), sha256=sha256)


def _entries(calls: Sequence[Call], refer: Callable[[str, torch.Tensor, str], TensorRef]) -> list[CallEntry]:
    """The index's entries; `refer` gets a name, the tensor and its hash, and says where the tensor lies."""
    entries = []
    for call in calls:

        def change(path: str, tensor: torch.Tensor, call: Call = call) -> TensorRef:
            check_finite(tensor, f"call {call.index}: {path!r}")
            return refer(f"{call.index}.{path}", tensor, tensor_digest(tensor))

        fields = {**vars(call), "prompts": list(call.prompts)}
        fields["kwargs"] = {name: _spec(map_tensors(value, change, name)) for name, value in call.kwargs.items()}
        fields["output"] = None if call.output is None else change(OUTPUT, call.output)
        entries.append(CallEntry(**fields))
    return entries


def _fingerprint(model: str, entries: Sequence[CallEntry]) -> str:
    digest = hashlib.sha256(model.encode())
    for entry in entries:
        plain = entry.model_dump(mode="json", context=("shard", "name"))
        if plain["output"] is None:
            del plain["output"]  # such calls have the fingerprint they had before outputs were recorded
        digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()


@dataclass
class _ShardWriter:
    folder: Path
    limit: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    written: int = 0
    known: dict[str, TensorRef] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, sha256: str) -> TensorRef:
        if sha256 not in self.known:
            if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
                self.flush()
            if name in self.pending:  # calls of several recordings may have one number
                name = f"{name}.{sha256}"
            self.pending[name] = tensor
            self.pending_bytes += tensor.nbytes
            self.known[sha256] = _ref(name, tensor, sha256, self._shard())
        return self.known[sha256]

    def flush(self) -> None:
        if self.pending:
            write_safetensors(self.folder / self._shard(), self.pending)
            self.pending, self.pending_bytes, self.written = {}, 0, self.written + 1

    def _shard(self) -> str:
        return f"calls-{self.written:05d}.safetensors"


class _StoredCalls(Sequence[Call]):
    """The calls of a folder, read when they are asked for."""

    def __init__(self, folder: Path, entries: list[CallEntry]) -> None:
        self.folder, self.entries = folder, entries
        self._shards: dict[str, Shards] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        entry = self.entries[index]
        kwargs = {name: _value(spec, self._read) for name, spec in entry.kwargs.items()}
        return entry.head(kwargs, _value(entry.output, self._read))

    def check_headers(self) -> None:
        for entry, _, ref in self._all_refs():
            path = inside(self.folder, ref.shard)
            where = f"{path}: call {entry.index}:"
            if not path.is_file():
                raise PpclError(f"{path}: no such file, and call {entry.index} is in it; copy it there, or {AGAIN}")
            try:
                stored = self._opened(ref.shard).stored
            except PpclError as error:
                reason = str(error).removeprefix(f"{path}: ").split("; ")[0]
                raise PpclError(f"{where} {reason}; {AGAIN}") from None
            if ref.name not in stored:
                raise PpclError(f"{where} holds no tensor {ref.name!r}; {AGAIN}")
            shape = list(stored[ref.name].shape)
            if shape != ref.shape:
                raise PpclError(f"{where} {ref.name!r} is {shape} here and {ref.shape} in {INDEX}; {AGAIN}")

    def check_values(self) -> None:
        first: dict[str, tuple[CallEntry, str, TensorRef]] = {}
        for entry, name, ref in self._all_refs():
            first.setdefault(ref.sha256, (entry, name, ref))
        for entry, name, ref in first.values():
            where = f"{self.folder / ref.shard}: call {entry.index}: {name!r}"
            tensor = self._read(ref)
            check_finite(tensor, where)
            if tensor_digest(tensor) != ref.sha256:
                raise PpclError(f"{where} is not what was recorded; {AGAIN}")

    def _all_refs(self) -> list[tuple[CallEntry, str, TensorRef]]:
        return [(entry, name, ref) for entry in self.entries for name, ref in entry.tensors()]

    def _opened(self, shard: str) -> Shards:
        if shard not in self._shards:
            self._shards[shard] = Shards.one_file(inside(self.folder, shard))
        return self._shards[shard]

    def _read(self, ref: TensorRef) -> torch.Tensor:
        # A copy: a mapped tensor lies at any address, and what MKL computes depends on the address on some processors.
        return self._opened(ref.shard).tensor(ref.name).clone()
