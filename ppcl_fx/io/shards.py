"""Weights that stay on disk: one safetensors file, or an index and its shards, checked by their headers."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import inside, own_file, read_json, safetensors_metadata, tensor_shapes
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.io.reading import os_errors

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
ONE_FILE = f"{STEM}.safetensors"
AGAIN = "copy it again from where it came"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Form = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""
DIGESTS = "ppcl-fx sha256"
"""What a header's metadata calls the digests of its file's tensors."""
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a floating-point weight may be stored as. Eight-bit floats mean nothing without their scales."""


class _Index(BaseModel):
    """A diffusers index: which file each tensor is in, and more."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: the file, its name there, and its first byte; the bytes are row by row, little-endian."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Shards:
    """The tensors of a checkpoint by name; each is read when asked for, memory-mapped."""

    def __init__(self, folder: Path, stored: Mapping[str, Stored]) -> None:
        self.folder = folder
        self.stored = dict(stored)
        self._files: dict[Path, Any] = {}
        self._finite: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path, stem: str = STEM) -> Shards:
        """Open the weights of a model folder, whose files' names begin with `stem`: headers are read, no tensor is.

        PpclError where there are no weights, a shard is missing or truncated, or the index is not about its folder.
        """
        folder = Path(folder)
        one, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if not index.is_file():
            if not one.is_file():
                variants = sorted(file.name for file in folder.glob(f"{stem}.*.safetensors*"))
                if variants:
                    variant = variants[0].removeprefix(f"{stem}.").split(".")[0].split("-")[0]
                    raise PpclError(
                        f"{folder}: holds a variant of the weights alone ({variants[0]}); load it with diffusers' "
                        f"from_pretrained(..., variant={variant!r}) and save it without one, or give the plain weights"
                    )
                neither = f"holds neither {one.name} nor {index.name}"
                raise PpclError(f"{folder}: {neither}; give a folder with safetensors weights")
            return cls(folder, stored_tensors(own_file(one)))
        weight_map = read_json(own_file(index), _Index).weight_map
        if not weight_map:
            raise PpclError(f"{index}: names no tensor; {AGAIN}")
        stored: dict[str, Stored] = {}
        for name in dict.fromkeys(weight_map.values()):
            if len(Path(name).parts) != 1 or name in ("..", "/") or "\0" in name or "\\" in name:
                raise PpclError(f"{index}: names the file {name!r}, which is not beside it; {AGAIN}")
            path = inside(folder, name)
            if not path.is_file():
                raise PpclError(f"{path}: no such file, and {index.name} names it; download the missing shard")
            for tensor, entry in stored_tensors(path).items():
                if tensor in stored:
                    raise PpclError(
                        f"{path}: holds {tensor}, which {stored[tensor].file.name} holds too, and loaders differ in "
                        "which of the two counts; save the model again, with each tensor in one file"
                    )
                stored[tensor] = entry
        for tensor, name in weight_map.items():
            if tensor not in stored or stored[tensor].file != folder / name:
                raise PpclError(f"{folder / name}: holds no {tensor}, which {index.name} says it does; {AGAIN}")
        return cls(folder, stored)

    @classmethod
    def one_file(cls, path: Path) -> Shards:
        """Open a single safetensors file of any name. Raises PpclError where it is missing or truncated."""
        return cls(path.parent, stored_tensors(path))

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted({entry.file for entry in self.stored.values()})

    def dtype(self, kept: Sequence[str]) -> torch.dtype:
        """Return the floating-point dtype of most stored elements, what the class keeps in float32 (`kept`) aside."""
        sizes: dict[torch.dtype, int] = defaultdict(int)
        for name, entry in self.stored.items():
            if entry.dtype.is_floating_point and not set(kept) & set(name.split(".")):
                sizes[entry.dtype] += torch.Size(entry.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self.stored.items()}

    def digests(self) -> dict[str, str]:
        """Return the digests (`ppcl_fx.io.fingerprint.tensor_digest`) that were stored with the tensors, if any."""
        found: dict[str, str] = {}
        for path in self.files:
            try:
                found |= TypeAdapter(dict[str, str]).validate_json(safetensors_metadata(path).get(DIGESTS, "{}"))
            except ValueError as error:
                raise PpclError(f"{path}: its stored digests are damaged; {AGAIN}") from error
        return found

    def checked(self, name: str) -> Tensor:
        """Return one tensor as `tensor` does; PpclError where a value is not finite, for which it is read once."""
        tensor = self.tensor(name)
        if name not in self._finite:
            check_weight(tensor, name, self.stored[name].file)
            self._finite.add(name)
        return tensor

    def tensors(self, dtype: torch.dtype | None = None, kept: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return every tensor, floating-point ones but those `kept` in float32 in `dtype` (as stored when None)."""
        found = {}
        for name in self.stored:
            tensor = self.checked(name)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(loaded_dtype(name, dtype, kept))
            found[name] = tensor
        self.close()
        return found

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, memory-mapped; PpclError where the file was cut or removed after it was opened."""
        entry = self.stored[name]
        if entry.file not in self._files:
            try:
                self._files[entry.file] = safe_open(entry.file, framework="pt")
            except Exception as error:
                raise PpclError(f"{entry.file}: changed while it was in use ({error}); {AGAIN}") from error
        tensor: Tensor = self._files[entry.file].get_tensor(entry.name)
        return tensor

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._files.clear()

    def check(self, model: nn.Module) -> None:
        """Refuse weights whose names, shapes, or kinds of dtype are not those of a model, on any device."""
        wanted = model.state_dict()
        missing = [name for name in wanted if name not in self.stored]
        extra = [name for name in self.stored if name not in wanted]
        if missing or extra:
            fault = _other_blocks(self.stored, wanted) or _misfit(type(model).__name__, missing, extra)
            raise PpclError(f"{self.folder}: {fault}")
        for name, tensor in wanted.items():
            entry = self.stored[name]
            if entry.shape != tuple(tensor.shape):
                there = f"{list(tensor.shape)} in {type(model).__name__} by config.json"
                raise PpclError(f"{entry.file}: {name} is {list(entry.shape)} here and {there}; {AGAIN}")
            check_kind(entry.dtype, tensor, name, entry.file)
        # Tensors that differ in their block's number alone have one dtype, or a shard is from elsewhere.
        kinds: dict[str, tuple[str, torch.dtype]] = {}
        for name, entry in self.stored.items():
            first, dtype = kinds.setdefault(re.sub(r"\.\d+\.", ".#.", name, count=1), (name, entry.dtype))
            if dtype != entry.dtype:
                fault = f"{name} is stored as {_plain(entry.dtype)} and {first} as {_plain(dtype)}"
                raise PpclError(f"{entry.file}: {fault}; the shards are not of one checkpoint, {AGAIN}")


def check_kind(stored: torch.dtype, wanted: Tensor, name: str, file: Path) -> None:
    """Refuse whole numbers that are stored for a floating-point weight, and the reverse."""
    if not (stored in WEIGHT_DTYPES if wanted.is_floating_point() else not stored.is_floating_point):
        why = f"{name} is stored as {_plain(stored)}, which cannot hold this weight"
        raise PpclError(f"{file}: {why}; give a checkpoint in float32, float16 or bfloat16")


def check_weight(tensor: Tensor, name: str, file: Path) -> None:
    """Refuse a weight that holds NaN or infinity."""
    if not is_finite(tensor):
        raise PpclError(f"{file}: {name} holds NaN or infinity, which no weight may; {AGAIN}")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every value of a tensor is a finite number; whole numbers are."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # One pass, without a mask as large as the tensor. Eight-bit floats have no order of their own.
    low, high = torch.aminmax(plain.float() if plain.element_size() == 1 else plain)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Return where each tensor of a safetensors file lies, as `tensor_shapes`; PpclError for an unknown dtype too."""
    shapes = tensor_shapes(path)
    for name, (dtype, _) in shapes.items():
        if dtype not in DTYPES:
            raise PpclError(f"{path}: {name} is stored as {dtype}, which cannot be read here; give float weights")
    found = {name: Stored(path, name, DTYPES[dtype], shape) for name, (dtype, shape) in shapes.items()}
    # The tensors lie one behind the other up to the end of the file: the library refuses any other.
    begin = path.stat().st_size - sum(entry.nbytes for entry in found.values())
    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():
            found[name] = replace(found[name], offset=begin)
            begin += found[name].nbytes
    return found


def _misfit(kind: str, missing: list[str], extra: list[str]) -> str:
    odd = missing or extra
    named = f"{odd[0]} and {len(odd) - 1} more" if len(odd) > 1 else odd[0]
    if missing:
        return f"the weights lack {named}, which {kind} has{near(odd[0], extra)}; download them again"
    return f"the weights hold {named}, which {kind} does not have; download them again"


def _other_blocks(stored: Iterable[str], wanted: Iterable[str]) -> str | None:
    here, there = _blocks(stored), _blocks(wanted)
    path = next((path for path in sorted(here.keys() & there.keys()) if here[path] != there[path]), None)
    return path and (
        f"config.json says {there[path]} blocks in {path} and the weights hold {here[path]}; "
        "mend config.json, or download the weights again"
    )


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Return how many numbers each numbered module list has, outermost lists only."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at:
            numbers[".".join(parts[:at])].add(parts[at])
    return {path: len(found) for path, found in numbers.items()}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loaded_dtype(name: str, dtype: torch.dtype, kept: Iterable[str]) -> torch.dtype:
    """Return what ``from_pretrained`` in `dtype` makes of a floating-point tensor; some are `kept` in float32."""
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def form_bytes(forms: Mapping[str, Form]) -> int:
    """Return the bytes that tensors of these forms take."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in forms.values())


def write_long(
    path: Path,
    forms: Mapping[str, Form],
    read: Callable[[str], Tensor],
    tick: Callable[[int], None] = lambda n: None,
    *,
    metadata: Mapping[str, str] | None = None,
    digests: bool = False,
) -> None:
    """Write tensors to a safetensors file in a folder that is not final yet, holding one at a time.

    The header holds the `metadata` and, with `digests`, each tensor's (see `Shards.digests`). `read` gives each tensor,
    memory-mapped ones go from file to file; `tick` is told the number of bytes after each.
    """
    header: dict[str, object] = {}
    at, kinds = 0, {dtype: name for name, dtype in DTYPES.items()}
    # Larger items first, so that each tensor begins at a multiple of its item's size.
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    for name in names:
        (dtype, shape), size = forms[name], form_bytes({name: forms[name]})
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    found = dict.fromkeys(names, "0" * 64) if digests else {}
    with os_errors(path.name, "cannot be written", "make room, or choose another place"), path.open("wb") as file:
        file.write(_header(header, metadata or {}, found))
        for name in names:
            tensor = read(name).detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == forms[name], name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if digests:
                found[name] = tensor_digest(tensor)
            tick(tensor.nbytes)
        file.seek(0)
        file.write(_header(header, metadata or {}, found))  # as long as before
        file.flush()
        os.fsync(file.fileno())


def _header(entries: Mapping[str, object], metadata: Mapping[str, str], digests: Mapping[str, str]) -> bytes:
    said = {**metadata, **({DIGESTS: json.dumps(digests, sort_keys=True)} if digests else {})}
    whole = {"__metadata__": dict(sorted(said.items())), **entries} if said else entries
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
