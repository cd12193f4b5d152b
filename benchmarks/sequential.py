"""Non-sequential distillation against sequential, on the model that ships: same plan, same steps, several seeds.

    python -m benchmarks.sequential

Non-sequential (the paper's) gives each student the teacher's states; sequential gives it what the students before it
give. The plan is the paper's for half of the parameters; no fine-tuning follows. A seed draws the calls anew. Rows that
``--work`` holds are not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ppcl_fx
from benchmarks.clock import RESULTS
from benchmarks.selection import RECORDED, distil, recorded, scored, velocity_error
from ppcl_fx import demo
from ppcl_fx.files import write_json
from ppcl_fx.passes.config import RewriteConfig
from ppcl_fx.report.machine import describe, slug
from ppcl_fx.shapes import load_pipeline

WAYS = ("non-sequential", "sequential")


def one_seed(seed: int, work: Path, keep: float, steps: tuple[int, int], per_category: int) -> list[dict[str, Any]]:
    """Return the two rows of a seed; both ways begin with the same students."""
    paths = {way: work / f"seed-{seed}-{way}.json" for way in WAYS}
    if not all(path.is_file() for path in paths.values()):
        settings = demo.Settings(out=work, recorded=RECORDED)
        pipeline = load_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        calls, held = recorded(pipeline, settings, seed)
        gm = ppcl_fx.trace(pipeline.transformer, calls.examples())
        some = calls[:: max(1, len(calls) // settings.analysed)]
        plan = ppcl_fx.select(ppcl_fx.analyze(gm, some), keep=keep, config=RewriteConfig(select="paper"))
        for way, path in paths.items():
            model = ppcl_fx.rewrite(gm, plan, some)
            run = work / f"seed-{seed}-{way}"
            seconds = distil(model, calls, settings, steps, seed, run, sequential=way == "sequential")
            row = {
                "seed": seed,
                "way": way,
                "edits": plan.ids,
                "velocity_error": round(velocity_error(model, held), 5),
                "score": round(scored(pipeline, model, per_category, seed), 4),
                "training_seconds": round(seconds, 1),
            }
            write_json(path, row)
    return [json.loads(path.read_text()) for path in paths.values()]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, one line for each way."""
    lines = []
    for way in WAYS:
        line: dict[str, Any] = {"way": way}
        for name in ("score", "velocity_error", "training_seconds"):
            values = [row[name] for row in rows if row["way"] == way]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line[name] = {"mean": round(statistics.mean(values), 4), "deviation": round(spread, 4)}
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequential", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", default="0,1", help="seeds (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the parameters (%(default)s)")
    parser.add_argument("--steps", default="400,40", help="of the stages depth and width (%(default)s)")
    parser.add_argument("--per-category", type=int, default=48, help="prompts scored a category (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/sequential"), help="finished rows (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="result file (default: benchmarks/results/...)")
    options = parser.parse_args(arguments)
    depth, width = (int(part) for part in options.steps.split(","))
    options.work.mkdir(parents=True, exist_ok=True)
    seeds = map(int, options.seeds.split(","))
    each = (one_seed(s, options.work, options.keep, (depth, width), options.per_category) for s in seeds)
    rows = list(itertools.chain.from_iterable(each))
    result = {
        "what": "sequential",
        **describe(("torch", "diffusers", "ppcl-fx")),
        "keep": options.keep,
        "steps": {"depth": depth, "width": width},
        "per_category": options.per_category,
        "table": table(rows),
        "rows": rows,
    }
    path = options.out or RESULTS / f"{slug()}-sequential.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    for line in result["table"]:
        found = ", ".join(
            f"{name.replace('_', ' ')} {line[name]['mean']:.4g} +- {line[name]['deviation']:.2g}"
            for name in ("score", "velocity_error", "training_seconds")
        )
        print(f"{line['way']}: {found}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
