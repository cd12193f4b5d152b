"""Which runtime runs an exported ratio: chosen by what is there, or named."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ppcl_fx.errors import PpclError, near
from ppcl_fx.export.extras import need
from ppcl_fx.export.runtime.folder import Artefact
from ppcl_fx.export.runtime.input_adapter import InputAdapter
from ppcl_fx.export.runtime.limits import TYPES
from ppcl_fx.export.store.manifest import FileManifest
from ppcl_fx.export.tensorrt.manifest import EngineManifest
from ppcl_fx.export.tensorrt.places import rebuild_command
from ppcl_fx.export.tensorrt.profiles import Range
from ppcl_fx.export.verify.integrity import check_artefacts

AUTO = "auto"
TENSORRT = "tensorrt"
ONNXRUNTIME = "onnxruntime"
ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
TORCH = "torch"
BACKENDS = (AUTO, TENSORRT, ONNXRUNTIME, ONNXRUNTIME_TENSORRT, TORCH)


class Session(Protocol):
    """An open file."""

    def run(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int], profile: int) -> torch.Tensor:
        """Run it on checked inputs that lie on its device; ``sizes`` are the call's open sizes, for which an engine has
        a profile of the index ``profile``.
        """
        ...


@dataclass(frozen=True)
class SessionChoice:
    """A ratio, the device, and what is to run it: one of `BACKENDS`, never ``auto``."""

    backend: str
    artefact: Artefact
    device: torch.device

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
        return [one.sizes for one in self.manifest.profiles] if isinstance(self.manifest, EngineManifest) else []

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
        return f"{export_command(self.artefact.keep, self.artefact.graph.parent)} --overwrite"


def export_command(keep: float, folder: Path) -> str:
    """Return the command line that exports a ratio."""
    return f"ppcl-fx export STUDENT --keep {keep:g} -o {shlex.quote(str(folder))}"


def device_of(wanted: str | torch.device | None) -> torch.device:
    """Return a device with its index, ``cuda:0`` for ``cuda``; without a name the first GPU, else the CPU.

    Raises:
        PpclError: there is no such device.
    """
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


def choose(artefact: Artefact, backend: str, device: torch.device) -> SessionChoice:
    """Choose what runs a ratio.

    Without a name: TensorRT where the ratio has an engine, the device is a GPU and TensorRT is installed; else
    onnxruntime where it has a provider for the device, and for a CPU where the file is not in half precision, for which
    it has few kernels there; else PyTorch.

    Raises:
        PpclError: the name is unknown, its library or its file is missing, or it does not run on the device.
    """
    if backend not in BACKENDS:
        raise PpclError(f"no backend {backend!r}{near(backend, BACKENDS)}; it is one of {', '.join(BACKENDS)}")
    if backend == AUTO:
        return SessionChoice(_best(artefact, device), artefact, device)
    choice = SessionChoice(backend, artefact, device)
    if backend in (TENSORRT, ONNXRUNTIME_TENSORRT) and device.type != "cuda":
        raise PpclError(f"TensorRT runs on NVIDIA GPUs, not on {device}; use backend='onnxruntime' there")
    if backend == TENSORRT:
        if artefact.engine is None:
            raise PpclError(f"{artefact.graph.parent}: no engine for the ratio {artefact.keep:g}; run: {choice.again}")
        need("tensorrt", extra="tensorrt", left="backend='onnxruntime' runs the ONNX file")
    elif backend == TORCH:
        need("onnx_ir")
    else:
        provider(backend, device)
    return choice


def _best(artefact: Artefact, device: torch.device) -> str:
    here = {name for name in ("tensorrt", "onnxruntime", "onnx_ir") if importlib.util.find_spec(name) is not None}
    if device.type == "cuda" and artefact.engine is not None and "tensorrt" in here:
        return TENSORRT
    kernels = device.type != "cpu" or artefact.manifest.dtype not in ("bfloat16", "float16")
    providers = need("onnxruntime").get_available_providers() if kernels and "onnxruntime" in here else []
    if _PROVIDERS.get((ONNXRUNTIME, device.type)) in providers:
        return ONNXRUNTIME
    if "onnx_ir" not in here:
        need("onnxruntime", left="nothing here can run the exported files without it")
    return TORCH


_PROVIDERS = {
    (ONNXRUNTIME, "cpu"): "CPUExecutionProvider",
    (ONNXRUNTIME, "cuda"): "CUDAExecutionProvider",
    (ONNXRUNTIME_TENSORRT, "cuda"): "TensorrtExecutionProvider",
}


def provider(backend: str, device: torch.device) -> str:
    """Return the name of onnxruntime's provider for a device.

    Raises:
        PpclError: onnxruntime is not installed, or the installed one has no such provider.
    """
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

    opened: dict[float, Any] = field(default_factory=dict)
    shared: dict[Any, torch.Tensor] = field(default_factory=dict)

    def get(self, choice: SessionChoice, adapter: InputAdapter) -> Session:
        """Return the session of a ratio; open it at its first use.

        Raises:
            PpclError: the file is not what was exported, its weights are others, or it cannot be opened.
        """
        keep = choice.artefact.keep
        if keep not in self.opened:
            backends = {choice.backend, *(session.choice.backend for session in self.opened.values())}
            if choice.device.type != "cpu" and backends != {TORCH}:
                self.close()
            self.opened[keep] = self._open(choice, adapter)
        session: Session = self.opened[keep]
        return session

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
