"""Timing, and where results go."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def timed(function: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Call `function` `repeats` times and return the seconds: each, their median and the smallest."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(round(time.perf_counter() - begin, 4))
    return {"seconds": seconds, "median": round(statistics.median(seconds), 4), "least": min(seconds)}
