"""How precisely float32 matrices are multiplied: as fast as their values allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices whose values were `dtype` on the units for that dtype; sums stay in float32.

    For values that `dtype` holds exactly nothing is lost: the product of two bfloat16 numbers fits a float32. Other
    float32 values are rounded to what the units take (bfloat16 on a CPU, TF32 on CUDA) before they are multiplied.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    wanted = "bf16" if device.type == "cpu" and dtype == torch.bfloat16 else ""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        backend, wanted = torch.backends.cuda.matmul, "tf32"
    if not wanted:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = wanted
    try:
        yield
    finally:
        backend.fp32_precision = before
