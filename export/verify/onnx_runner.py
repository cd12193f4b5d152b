"""Run an ONNX file in onnxruntime: the differences to PyTorch, and the time it takes."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need


def session(path: str | Path, threads: int = 0) -> Any:
    """Open an ONNX file in onnxruntime, on the CPU, with so many threads within one operator (0: its own choice).

    Raises:
        PpclError: onnxruntime is missing, or does not take the file.
    """
    runtime = need("onnxruntime")
    options = exact_options()
    options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except runtime_errors() as error:
        raise PpclError(f"{path}: onnxruntime does not take it ({one_line(error)}); export the model again") from error


def exact_options() -> Any:
    """Return onnxruntime's options for a session that computes in the types of its file."""
    options = need("onnxruntime").SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    # Else it makes integer products of those with weights in few bits, and refuses its own where they are FP8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions by which onnxruntime says that something is wrong with a file or a call."""
    state = need("onnxruntime.capi.onnxruntime_pybind11_state")
    names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoSuchFile NotImplemented RuntimeException"
    return (RuntimeError, ValueError, OSError, *(getattr(state, name) for name in names.split()))


def one_line(error: BaseException) -> str:
    """Return an exception's message in one line that is not too long."""
    return " ".join(str(error).split())[:300]


def run(running: Any, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a session once and return its first output.

    Raises:
        PpclError: onnxruntime cannot run the file on these inputs.
    """
    try:
        outputs = running.run(None, {name: tensor.contiguous().numpy() for name, tensor in feeds.items()})
    except runtime_errors() as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feeds.items())
        raise PpclError(
            f"onnxruntime cannot run the exported file on {shapes}: {one_line(error)}; nothing was kept"
        ) from error
    return torch.from_numpy(outputs[0])


def latency(running: Any, feeds: Mapping[str, torch.Tensor], runs: int = 10, warmup: int = 2) -> float:
    """Return the median time of one of several runs in milliseconds; those of the warm-up come before, untimed."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in feeds.items()}
    times = timeit.repeat(lambda: running.run(None, arrays), number=1, repeat=warmup + runs)
    return 1e3 * statistics.median(times[warmup:])
