"""Load an engine, and put the weights of the store into one that was built without."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.manifest import (
    EngineManifest,
    check_engine,
    read_engine_manifest,
    rebuild_command,
)
from ppcl_fx.export.tensorrt.monitor import Messages
from ppcl_fx.export.tensorrt_api import Api, errors_of, load_tensorrt
from ppcl_fx.io.files import inside
from ppcl_fx.io.reading import open_regular


@dataclass(frozen=True)
class LoadedEngine:
    """The library's ``ICudaEngine``, weights and all, its manifest, and what it needs as long as it lives."""

    engine: Any
    manifest: EngineManifest
    api: Api
    keepalive: tuple[Any, ...]


def load_engine(
    engine: str | Path, *, api: Api | None = None, gpu_index: int = 0, read_weights: bool | None = None
) -> LoadedEngine:
    """Load an engine that `build_engine` wrote.

    Args:
        api: the library that built it, and the GPU; found if left out.
        gpu_index: which GPU, as CUDA counts them; it has to be CUDA's current one.
        read_weights: compare the weight files with the manifest by their hashes, not by their sizes alone. By default
            for an engine without weights: others than those it was built from give wrong pictures without a word.

    Raises:
        PpclError: the engine is missing, truncated or damaged, is for another GPU, version or graph, its weights are
            missing or changed, or the library does not take it.
    """
    path = Path(engine)
    manifest = read_engine_manifest(path)
    options = manifest.options
    api = api or load_tensorrt(f"{path} stays", gpu_index, manifest.library)
    check_engine(manifest, path, api, options.stripped if read_weights is None else read_weights)
    messages = Messages(api)
    runtime = api.make("Runtime", logger=messages.logger)
    # It is TensorRT's default: an engine that brings code for the host is refused, as no code of a folder is run.
    api.set("Runtime.engine_host_code_allowed", runtime, False)
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reason = invalid(api, runtime, data) if api.kind == "rtx" else None
        if reason is not None:
            raise PpclError(f"{path}: {reason}{messages.why()}; build it again: {rebuild_command(path)}")
        loaded = api.call("Runtime.deserialize_cuda_engine", runtime, serialized_engine=data)
    if loaded is None:
        raise PpclError(f"{path}: {api.name} cannot read it{messages.why()}; build it here: {rebuild_command(path)}")
    if options.stripped:
        refit(loaded, inside(path.parent, manifest.onnx), api=api, messages=messages)
    if options.weight_streaming is not None:
        _stream(loaded, options.weight_streaming, api, path, messages)
    return LoadedEngine(loaded, manifest, api, (runtime, messages.logger))


def invalid(api: Api, runtime: Any, engine: bytes | mmap.mmap) -> str | None:
    """Tell why an engine of TensorRT for RTX cannot run here, as its header says; None where it can."""
    validity, faults = api.call("Runtime.get_engine_validity", runtime, buffer=engine)
    if validity != api.value("EngineValidity.INVALID"):
        return None
    known = {
        api.value("EngineInvalidityDiagnostics.VERSION_MISMATCH"): "it is of another version of the library",
        api.value("EngineInvalidityDiagnostics.UNSUPPORTED_CC"): "it was not built for this card",
        api.value("EngineInvalidityDiagnostics.OLD_CUDA_DRIVER"): "the driver is too old; install a newer one",
        api.value("EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME"): "the CUDA runtime is too old; install a newer one",
        api.value("EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY"): "the card has too little memory for it",
        api.value("EngineInvalidityDiagnostics.MALFORMED_ENGINE"): "it is damaged",
        api.value("EngineInvalidityDiagnostics.CUDA_ERROR"): "CUDA failed",
    }
    found = [words for fault, words in known.items() if int(fault) & int(faults)]
    return ", and ".join(found) or "the library says that it is not valid here"


def _stream(engine: Any, budget: int, api: Api, path: Path, messages: Messages) -> None:
    """Say how much of the weights stays on the GPU, before the first execution context: afterwards it is fixed."""
    wanted = min(budget, int(api.get("ICudaEngine.streamable_weights_size", engine)))
    api.set("ICudaEngine.weight_streaming_budget_v2", engine, wanted)
    if api.get("ICudaEngine.weight_streaming_budget_v2", engine) != wanted:  # a refusal raises nothing
        raise PpclError(
            f"{path}: TensorRT does not keep {wanted} bytes of its weights on the GPU{messages.why()}; build it with "
            f"another --weight-streaming: {rebuild_command(path)}"
        )


def refit(engine: Any, onnx: Path, *, api: Api, messages: Messages | None = None) -> None:
    """Put the weights of an ONNX file, and of the store it points to, into an engine.

    A stripped engine runs without them too, and gives zeros, so each that is missing is an error here.

    Args:
        engine: TensorRT's ``ICudaEngine``, built with a kind of refit.
        onnx: the ONNX file it was built from. For ``identical`` these must be the very weights it was built with.
        messages: what TensorRT said when it was loaded.

    Raises:
        PpclError: the engine cannot be refitted, or the file does not give it all of its weights.
    """
    if not api.get("ICudaEngine.refittable", engine):
        raise PpclError(f"{onnx}: the engine was not built to take weights; build it with --stripped or --refit")
    messages = messages or Messages(api)
    refitter = api.make("Refitter", engine=engine, logger=messages.logger)
    parser = api.make("OnnxParserRefitter", refitter=refitter, logger=messages.logger)
    if not api.call("OnnxParserRefitter.refit_from_file", parser, model=str(onnx)):
        count = api.get("OnnxParserRefitter.num_errors", parser)
        errors = (api.call("OnnxParserRefitter.get_error", parser, index=index) for index in range(count))
        raise PpclError(f"{onnx}: TensorRT cannot take its weights ({errors_of(api, errors)}); build the engine again")
    missing = list(api.call("Refitter.get_missing_weights", refitter))
    if missing:
        raise PpclError(
            f"{onnx}: {len(missing)} weights of the engine are not in it ({missing[0]!r}); build the engine again"
        )
    if not api.call("Refitter.refit_cuda_engine", refitter):
        raise PpclError(f"{onnx}: TensorRT cannot refit the engine{messages.why()}; build the engine again")
