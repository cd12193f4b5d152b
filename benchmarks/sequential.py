"""Non-sequential distillation against sequential, on the model that ships: same plan, same steps, several seeds.

    python -m benchmarks.sequential

Non-sequential (the paper's) gives each student the teacher's states; sequential gives it what the students before it
give. The plan is the paper's for half of the parameters; no fine-tuning follows. A seed draws the calls anew. Rows that
``--work`` holds are not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, spread, write
from benchmarks.selection import RECORDED, distil, recorded, row
from ppcl_fx import demo
from ppcl_fx.io.files import write_json
from ppcl_fx.passes.options import RewriteConfig

WAYS = ("non-sequential", "sequential")


def one_seed(seed: int, work: Path, keep: float, steps: tuple[int, int], per_category: int) -> list[dict[str, Any]]:
    """Return the two rows of a seed; both ways begin with the same students."""
    paths = {way: work / f"seed-{seed}-{way}.json" for way in WAYS}
    if not all(path.is_file() for path in paths.values()):
        settings = demo.DemoSettings(out=work, recorded=RECORDED)
        pipeline = shapes_pipeline()
        calls, held = recorded(pipeline, settings, seed)
        gm = ppcl_fx.trace(pipeline.transformer, calls.examples())
        some = calls[:: max(1, len(calls) // settings.analysed)]
        plan = ppcl_fx.select(ppcl_fx.analyze(gm, some), keep=keep, config=RewriteConfig(select="paper"))
        for way, path in paths.items():
            model = ppcl_fx.rewrite(gm, plan, some)
            run = work / f"seed-{seed}-{way}"
            seconds = distil(model, calls, settings, steps, seed, run, sequential=way == "sequential")
            write_json(path, {"way": way, **row(pipeline, model, held, seed, per_category, seconds)})
    return [json.loads(path.read_text()) for path in paths.values()]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, one line for each way."""
    lines = []
    for way in WAYS:
        here = [one for one in rows if one["way"] == way]
        names = ("score", "velocity_error", "training_seconds")
        lines.append({"way": way, **{name: spread([one[name] for one in here]) for name in names}})
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    made = parser(
        "sequential",
        __doc__,
        seeds=("0,1", "seeds"),
        keep=(0.5, "share of the parameters"),
        steps=("400,40", "of the stages depth and width"),
        per_category=(48, "prompts scored a category"),
        work=(Path("build/sequential"), "finished rows"),
    )
    options = made.parse_args(arguments)
    depth, width = (int(part) for part in options.steps.split(","))
    options.work.mkdir(parents=True, exist_ok=True)
    seeds = map(int, options.seeds.split(","))
    each = (one_seed(s, options.work, options.keep, (depth, width), options.per_category) for s in seeds)
    rows = list(itertools.chain.from_iterable(each))
    result = {
        "keep": options.keep,
        "steps": {"depth": depth, "width": width},
        "per_category": options.per_category,
        "table": table(rows),
        "rows": rows,
    }
    for line in result["table"]:
        found = ", ".join(
            f"{name.replace('_', ' ')} {line[name]['mean']:.4g} +- {line[name]['deviation']:.2g}"
            for name in ("score", "velocity_error", "training_seconds")
        )
        print(f"{line['way']}: {found}")
    write("sequential", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
