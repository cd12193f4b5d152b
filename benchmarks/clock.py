"""What benchmarks share: timing, the command line, processes of their own, and where results go."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl_fx.io.files import write_json
from ppcl_fx.report.machine import describe, slug
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.shapes.pipeline import ShapesPipeline

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "diffusers", "ppcl-fx")


def timed(function: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Call `function` `repeats` times and return the seconds: each, their median and the smallest."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(round(time.perf_counter() - begin, 4))
    return {"seconds": seconds, "median": round(statistics.median(seconds), 4), "least": min(seconds)}


def parser(name: str, doc: str | None, **options: tuple[Any, str]) -> argparse.ArgumentParser:
    """Return the command line of a benchmark: options with their defaults and words, and ``--out``."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").splitlines()[0])
    for option, (default, words) in options.items():
        flag = f"--{option.replace('_', '-')}"
        made.add_argument(flag, type=type(default), default=default, help=f"{words} (default: %(default)s)")
    made.add_argument("--out", type=Path, default=None, help="result file (default: benchmarks/results/...)")
    return made


def write(
    what: str, out: Path | None, found: Mapping[str, Any], packages: Sequence[str] = PACKAGES, note: bool = True
) -> Path:
    """Write a result and what it ran on, to `out` or into `RESULTS`; return the path, and print it with `note`."""
    path = out or RESULTS / f"{slug()}-{what}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"what": what, **describe(packages), **found})
    if note:
        print(path)
    return path


def apart(module: str, options: argparse.Namespace, names: Sequence[str], *more: str) -> dict[str, Any]:
    """Run a benchmark's part in a process of its own, with these options of ours; return what it printed last."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *more]
    for name in names:
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def shapes_pipeline() -> ShapesPipeline:
    """Return the shipped pipeline, without its progress bar."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and the standard deviation of values, 0 of one alone."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "deviation": round(deviation, 4)}
