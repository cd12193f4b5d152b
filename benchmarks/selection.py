"""The selection rules side by side on the model that ships: same budgets, same steps, several seeds.

    python -m benchmarks.selection

For each seed the calls are recorded, analysed and scored anew. For each rule and ratio a plan of its own is made and
distilled (no fine-tuning), all with the demo's settings. Finished rows are kept in ``--work``, so that a run that was
stopped goes on, and seeds can be shared out between processes.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, spread, write
from ppcl_fx import demo
from ppcl_fx.calls.store import Calls
from ppcl_fx.io.files import write_json
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.shapes.captions import CATEGORIES, every_prompt
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.shapes.score import score_pictures, summarise
from ppcl_fx.train import train
from ppcl_fx.train.config import Weights

RULES = ("paper", "uniform", "budget")
KEEPS = (0.7, 0.5)
UNIFORM_MARGIN = 0.02
"""Whole blocks are all that uniform removal can remove: it may keep so much more, rather than lose one block more."""
RECORDED = 2
"""How often each prompt is recorded to train on."""
HELD_OUT = 32
"""Prompts recorded apart, for the velocity error."""


def texts() -> list[str]:
    """Every prompt there is."""
    return [prompt.text for category in CATEGORIES for prompt in every_prompt(category)]


def recorded(pipeline: ShapesPipeline, settings: demo.DemoSettings, seed: int) -> tuple[Calls, Calls]:
    """Record the calls to train on and the calls to test on; their noise differs."""
    shuffled = texts() * settings.recorded
    random.Random(seed).shuffle(shuffled)
    calls = ppcl_fx.record(pipeline, shuffled, batch_size=settings.batch, seed=1_000_000 * (seed + 1))
    held = random.Random(seed).sample(texts(), HELD_OUT)
    apart = 1_000_000 * (seed + 1) + 500_000
    return calls, ppcl_fx.record(pipeline, held, batch_size=settings.batch, seed=apart)


@torch.no_grad()
def velocity_error(model: PluggableModel, calls: Calls) -> float:
    """Relative L2 error of the students' output over `calls`: ``||student - teacher|| / ||teacher||``."""
    students = model.students
    ours = [model(**{**call.kwargs, "return_dict": False})[0].double() for call in calls]
    model.plug(keep=1.0)
    teachers = [model(**{**call.kwargs, "return_dict": False})[0].double() for call in calls]
    model.plug(students=students)
    apart = sum(float((mine - teacher).square().sum()) for mine, teacher in zip(ours, teachers, strict=True))
    return float((apart / sum(float(teacher.square().sum()) for teacher in teachers)) ** 0.5)


def scored(pipeline: ShapesPipeline, transformer: Any, per_category: int, seed: int) -> float:
    """Score `transformer` in the pipeline, which gets its own one back."""
    own = pipeline.transformer
    pipeline.transformer = transformer
    try:
        return summarise(score_pictures(pipeline, per_category, seed))["overall"]
    finally:
        pipeline.transformer = own


def distil(
    model: PluggableModel,
    calls: Calls,
    settings: demo.DemoSettings,
    steps: tuple[int, int],
    seed: int,
    out: Path,
    *,
    sequential: bool = False,
) -> float:
    """Train and plug the students with the demo's settings; return the seconds of the steps. Goes on where stopped."""
    counts = demo.fitting_steps((*steps, 1), {edit.kind for edit in model.plan.edits})
    trained = train(
        model,
        calls,
        stages=("depth", "width"),
        steps={stage: counts[stage] for stage in ("depth", "width")},
        out=out,
        resume=True,
        batch=settings.distil_calls,
        lr=settings.lr,
        seed=seed,
        sequential=sequential,
        weights=Weights(relative=1.0),
    )
    model.plug(students=model.plan.ids)
    return sum(stage.seconds for stage in trained.stages)


def one_seed(seed: int, rules: Sequence[str], work: Path, steps: tuple[int, int], per_category: int) -> None:
    """Write the rows of one seed to `work`; those that it holds for the same plan are not made again."""
    settings = demo.DemoSettings(out=work, recorded=RECORDED)
    paths = {(rule, keep): work / f"seed-{seed}-{rule}-{keep:g}.json" for rule in rules for keep in KEEPS}
    pipeline = shapes_pipeline()
    teacher = work / f"seed-{seed}-teacher.json"
    if not teacher.is_file():
        write_json(teacher, {"score": scored(pipeline, pipeline.transformer, per_category, seed)})
    score = json.loads(teacher.read_text())["score"]
    calls, held = recorded(pipeline, settings, seed)
    gm = ppcl_fx.trace(pipeline.transformer, calls.examples())
    some = calls[:: max(1, len(calls) // settings.analysed)]
    analysis = ppcl_fx.analyze(gm, some)
    for (rule, keep), path in paths.items():
        uniform = rule == "uniform"
        config = RewriteConfig(keep=keep + UNIFORM_MARGIN * uniform, select=rule, width=not uniform)
        plan = ppcl_fx.select(analysis, config=config)
        if path.is_file() and json.loads(path.read_text())["edits"] == plan.ids:
            continue
        model = ppcl_fx.rewrite(gm, plan, some)
        seconds = distil(model, calls, settings, steps, seed, path.with_suffix(""))
        share = round(plan.params / plan.teacher_params, 4)
        made = {"rule": rule, "keep": keep, "share": share, "params": plan.params, "teacher": round(score, 4)}
        made |= row(pipeline, model, held, seed, per_category, seconds)
        write_json(path, made)
        print(f"{rule:<8} {keep:.0%} seed {seed}: {made['score']:.3f} of {score:.3f}, {seconds:.0f} s", flush=True)


def row(
    pipeline: ShapesPipeline, model: PluggableModel, held: Calls, seed: int, per_category: int, seconds: float
) -> dict[str, Any]:
    """Return what a trained model gives: its edits, velocity error and score, and the seconds that it took."""
    return {
        "seed": seed,
        "edits": model.plan.ids,
        "velocity_error": round(velocity_error(model, held), 5),
        "score": round(scored(pipeline, model, per_category, seed), 4),
        "training_seconds": round(seconds, 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, one line for each rule and ratio."""
    lines = []
    for keep, rule in itertools.product(KEEPS, RULES):
        here = [row for row in rows if (row["rule"], row["keep"]) == (rule, keep)]
        line: dict[str, Any] = {"rule": rule, "keep": keep, "seeds": [row["seed"] for row in here]}
        line |= {name: spread([row[name] for row in here]) for name in ("share", "score", "velocity_error")}
        line["drop"] = spread([1 - row["score"] / row["teacher"] for row in here])
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> Path | None:
    """Measure, print and write the result; return its path, or None where other processes have rows to make yet."""
    made = parser(
        "selection",
        __doc__,
        seeds=("0,1,2", "seeds of this process"),
        rules=(",".join(RULES), "rules of this process"),
        of=("0,1,2", "seeds of the table"),
        steps=("400,40", "of the stages depth and width"),
        per_category=(48, "prompts scored a category"),
        work=(Path("build/selection"), "finished rows"),
    )
    options = made.parse_args(arguments)
    depth, width = (int(part) for part in options.steps.split(","))
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        one_seed(seed, options.rules.split(","), options.work, (depth, width), options.per_category)
    wanted = [
        options.work / f"seed-{seed}-{rule}-{keep:g}.json"
        for seed, rule, keep in itertools.product(map(int, options.of.split(",")), RULES, KEEPS)
    ]
    if not all(path.is_file() for path in wanted):
        return None
    rows = [json.loads(path.read_text()) for path in wanted]
    lines = table(rows)
    result = {
        "steps": {"depth": depth, "width": width},
        "per_category": options.per_category,
        "table": lines,
        "rows": rows,
    }
    for line in lines:
        score, drop, error = line["score"], line["drop"], line["velocity_error"]
        print(
            f"{line['keep']:.0%} {line['rule']:<8} score {score['mean']:.3f} +- {score['deviation']:.3f}   "
            f"drop {drop['mean']:.1%}   velocity error {error['mean']:.3f} +- {error['deviation']:.3f}"
        )
    return write("selection", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
