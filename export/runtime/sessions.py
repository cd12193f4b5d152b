"""What runtimes share: which one runs an exported ratio, what is open, and whether a call is one that a file takes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import need
from ppcl_fx.export.runtime.folder import Artefact
from ppcl_fx.export.runtime.input_adapter import InputAdapter
from ppcl_fx.export.runtime.options import RuntimeOptions
from ppcl_fx.export.store.manifest import FileManifest, Port
from ppcl_fx.export.tensorrt.manifest import EngineManifest, rebuild_command
from ppcl_fx.export.tensorrt.profiles import Range
from ppcl_fx.export.tensorrt_api import LIBRARIES, Library
from ppcl_fx.export.verify.integrity import check_artefacts

AUTO = "auto"
TENSORRT = "tensorrt"
ONNXRUNTIME = "onnxruntime"
ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
TORCH = "torch"
BACKENDS = (AUTO, TENSORRT, ONNXRUNTIME, ONNXRUNTIME_TENSORRT, TORCH)


DEFAULTS = RuntimeOptions()

TYPES: dict[str, torch.dtype] = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
"""ONNX's names of types, as manifests have them."""


class Session(Protocol):
    """An open file."""

    choice: SessionChoice

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run it on checked inputs that lie on its device; ``sizes`` are the call's open sizes, for which an engine has
        a profile of the index ``profile``.
        """


@dataclass(frozen=True)
class SessionChoice:
    """A ratio, the device, what is to run it, one of `BACKENDS`, never ``auto``, and how."""

    backend: str
    artefact: Artefact
    device: torch.device
    options: RuntimeOptions = DEFAULTS

    @property
    def file(self) -> Path:
        """The file that runs."""
        engine = self.artefact.engine
        return engine if self.backend == TENSORRT and engine is not None else self.artefact.graph

    @property
    def manifest(self) -> FileManifest:
        """The manifest of that file."""
        engine = self.artefact.engine_manifest
        return engine if self.backend == TENSORRT and engine is not None else self.artefact.manifest

    @property
    def profiles(self) -> list[Mapping[str, Range]]:
        """The sizes that each of its profiles takes; an ONNX file has none and is open."""
        manifest = self.manifest
        return [one.sizes for one in manifest.profiles] if isinstance(manifest, EngineManifest) else []

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        found = getattr(torch, self.manifest.dtype, None)
        if found not in TYPES.values():
            raise PpclError(f"{self.file}: its manifest names the unknown type {self.manifest.dtype!r}; export again")
        assert isinstance(found, torch.dtype)
        return found

    @property
    def again(self) -> str:
        """The command that makes this file anew."""
        if self.backend == TENSORRT:
            return rebuild_command(self.file)
        return f"{export_command(self.artefact.manifest.keep, self.artefact.graph.parent)} --overwrite"


def export_command(keep: float, folder: Path) -> str:
    """Return the command line that exports a ratio."""
    return f"ppcl-fx export STUDENT --keep {keep:g} -o {shlex.quote(str(folder))}"


def device_of(wanted: str | torch.device | None) -> torch.device:
    """Return a device with its index, ``cuda:0`` for ``cuda``; without a name the first GPU, else the CPU."""
    try:
        found = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise PpclError(f"no device {wanted!r}; give cpu, cuda or cuda:1, for example") from error
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count()
    index = found.index if found.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise PpclError(f"{found}: PyTorch sees {count} GPUs here; give another device, or leave it out")
    return torch.device("cuda", index)


def choose(
    artefact: Artefact, backend: str, device: torch.device, options: RuntimeOptions | None = None
) -> SessionChoice:
    """Choose what runs a ratio.

    Without a name: the engine where the ratio has one, the device is a GPU and the library that built it, TensorRT or
    TensorRT for RTX, is installed; else
    onnxruntime where it has a provider for the device, and for a CPU where the file is not in half precision, for which
    it has few kernels there; else PyTorch. `PpclError` where a name is unknown, or what it needs is not there.
    """
    if backend not in BACKENDS:
        raise PpclError(f"no backend {backend!r}{near(backend, BACKENDS)}; it is one of {', '.join(BACKENDS)}")
    options = options or DEFAULTS
    if backend == AUTO:
        return SessionChoice(_best(artefact, device), artefact, device, options)
    choice = SessionChoice(backend, artefact, device, options)
    if backend in (TENSORRT, ONNXRUNTIME_TENSORRT) and device.type != "cuda":
        raise PpclError(f"TensorRT runs on NVIDIA GPUs, not on {device}; use backend='onnxruntime' there")
    if backend == TENSORRT:
        if artefact.engine is None:
            keep = f"{artefact.manifest.keep:g}"
            raise PpclError(f"{artefact.graph.parent}: no engine for the ratio {keep}; run: {choice.again}")
        library = _library(artefact)
        need(library.module, extra=library.extra, left="backend='onnxruntime' runs the ONNX file")
    elif backend == TORCH:
        need("onnx_ir")
    else:
        provider(backend, device)
    return choice


def _library(artefact: Artefact) -> Library:
    """Return the library that built a ratio's engine."""
    built = artefact.engine_manifest
    return LIBRARIES["tensorrt" if built is None else built.library]


def _best(artefact: Artefact, device: torch.device) -> str:
    if device.type == "cuda" and artefact.engine is not None and find_spec(_library(artefact).module):
        return TENSORRT
    kernels = device.type != "cpu" or artefact.manifest.dtype not in ("bfloat16", "float16")
    providers = need("onnxruntime").get_available_providers() if kernels and find_spec("onnxruntime") else []
    if _PROVIDERS.get((ONNXRUNTIME, device.type)) in providers:
        return ONNXRUNTIME
    if not find_spec("onnx_ir"):
        need("onnxruntime", left="nothing here can run the exported files without it")
    return TORCH


_PROVIDERS = {
    (ONNXRUNTIME, "cpu"): "CPUExecutionProvider",
    (ONNXRUNTIME, "cuda"): "CUDAExecutionProvider",
    (ONNXRUNTIME_TENSORRT, "cuda"): "TensorrtExecutionProvider",
}


def provider(backend: str, device: torch.device) -> str:
    """Return the name of onnxruntime's provider for a device; `PpclError` where there is none."""
    available = need("onnxruntime").get_available_providers()
    wanted = _PROVIDERS.get((backend, device.type))
    if wanted is None:
        raise PpclError(f"{backend} does not run on {device} here; use backend='torch', or device='cpu'")
    if wanted not in available:
        raise PpclError(
            f"the installed onnxruntime has no {wanted} (it has {', '.join(available)}): "
            "pip install onnxruntime-gpu, or use backend='torch'"
        )
    return wanted


@dataclass
class Sessions:
    """The open sessions of a folder. On a CPU they stay open, since weights are mapped from one place; on a GPU each
    has its own copy of the weights, so the last one closes before the next one opens.
    """

    opened: dict[float, Session] = field(default_factory=dict)
    shared: dict[Any, torch.Tensor] = field(default_factory=dict)

    def get(self, choice: SessionChoice, adapter: InputAdapter) -> Session:
        """Return the session of a ratio; open it at its first use, `PpclError` where that cannot be."""
        keep = choice.artefact.manifest.keep
        if keep not in self.opened:
            backends = {choice.backend, *(session.choice.backend for session in self.opened.values())}
            if choice.device.type != "cpu" and backends != {TORCH}:
                self.close()
            self.opened[keep] = self._open(choice, adapter)
        return self.opened[keep]

    def _open(self, choice: SessionChoice, adapter: InputAdapter) -> Session:
        if choice.backend == TENSORRT:  # an engine's own manifest says what it was built from
            from ppcl_fx.export.runtime.tensorrt_session import TensorRTSession

            return TensorRTSession(choice)
        check_artefacts(choice.file, hashes=False)
        if choice.backend == TORCH:
            from ppcl_fx.export.runtime.torch_session import TorchSession

            return TorchSession(choice, adapter, self.shared)
        from ppcl_fx.export.runtime.onnx_session import OnnxSession

        return OnnxSession(choice)

    def close(self) -> None:
        """Forget every session and its weights."""
        for session in self.opened.values():
            if session.choice.device.type == "cuda":
                torch.cuda.synchronize(session.choice.device)  # what it still computes reads its memory
        self.opened.clear()
        self.shared.clear()


# ---- what a file takes -----------------------------------------------------------------------------------------


def typed(port: Port, tensor: torch.Tensor) -> torch.Tensor:
    """Return an input in the type that a file takes: floats become other floats, nothing else is converted."""
    wanted = TYPES.get(port.dtype)
    if wanted is None:
        raise PpclError(f"the input {port.name!r} is of the type {port.dtype!r}, which PyTorch has no name for")
    if tensor.dtype == wanted:
        return tensor
    if not (tensor.is_floating_point() and wanted.is_floating_point):
        raise PpclError(f"the input {port.name!r} is {tensor.dtype}, and the exported file takes {wanted}; convert it")
    return tensor.to(wanted)


def sizes_of(file: str, ports: Sequence[Port], feeds: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Check a tensor for each of a file's inputs, and return the call's open sizes by name."""
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for port in ports:
        shape, here = list(feeds[port.name].shape), f"{file} takes {port.name} [{', '.join(map(str, port.shape))}]"
        if len(shape) != len(port.shape):
            raise PpclError(f"{here}, and this call has {shape}; the other sizes are part of the model")
        for dim, (size, wanted) in enumerate(zip(shape, port.shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    raise PpclError(f"{here}, and dimension {dim} of this call is {size}; it is part of the model")
                continue
            known = sizes.setdefault(wanted, size)
            first.setdefault(wanted, port.name)
            if known != size:
                raise PpclError(f"{here}, and {wanted} is {size} here but {known} in {first[wanted]}; make them equal")
            if size < 1:
                raise PpclError(f"{here}, and {wanted} of this call is {size}; give at least one")
    return sizes


def profile_of(file: str, sizes: Mapping[str, int], profiles: Sequence[Mapping[str, Range]], wider: str) -> int:
    """Return the tightest profile of an engine that takes a call, by its index; 0 for a file without profiles.

    Kernels are tuned for a profile, so of two that fit the one with fewer other sizes is better; of equals the first.
    A size that a profile does not name is open. Where none fits, the error says how to get a file that takes more
    (`wider`).
    """
    outside = [
        [n for n, size in sizes.items() if n in profile and not profile[n].min <= size <= profile[n].max]
        for profile in profiles
    ]
    fitting = [index for index, faults in enumerate(outside) if not faults]
    if fitting or not profiles:
        rooms = [[one[n].max - one[n].min + 1 for n in sizes if n in one] for one in profiles]
        return min(fitting, key=lambda index: math.prod(rooms[index]), default=0)
    names, nearest = min(zip(outside, profiles, strict=True), key=lambda pair: len(pair[0]))
    faults = [f"{name} {sizes[name]} (it takes {nearest[name].min} to {nearest[name].max})" for name in names]
    raise PpclError(f"{file} is not for {', '.join(faults)}; {wider}")
