"""The whole pipeline on the model that ships, without GPU and network: ``python -m ppcl_fx.demo --out build/demo``."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import write_json

VARIANTS = ("ppcl", "uniform", "sequential")
KEEPS = (1.0, 0.7, 0.6, 0.5)
STEPS = (600, 60, 800)
LEAVES = (
    "calls", "analysis.json", "plan.json", "student", "train", "engines", "engines-finetuned", "engines-int8",
    "engines-int4", "pictures", "report.html", "summary.json",
)  # fmt: skip
MARK = "demo.json"  # says that a demo wrote what lies beside it
SEED = 42


@dataclass(frozen=True)
class DemoSettings:
    """What the demo was asked for."""

    out: Path
    steps: tuple[int, int, int] = STEPS  # of depth, width and finetune
    per_category: int = 64  # prompts scored in each of the six categories
    variant: str = "ppcl"  # or one of the two controls; `ppcl_fx.demo_results.LEADS` says what they do
    weights: Path | None = None  # the folder of another shapes pipeline; the one that ships when None
    recorded: int = 4  # how often each distinct prompt is recorded, each time with other noise
    keeps: tuple[float, ...] = KEEPS  # the ratios, the teacher's 1.0 first, the smallest last
    batch: int = 16  # pictures drawn at once while recording, and samples in one recorded call
    analysed: int = 48  # recorded calls that the analysis looks at
    distil_calls: int = 1  # recorded calls in one step
    finetune_calls: int = 1
    lr: float = 1.5e-3  # peak learning rate of distillation
    finetune_lr: float = 1e-4


def fitting_steps(steps: tuple[int, int, int], kinds: set[str]) -> dict[str, int]:
    """Return the steps of each stage, in all the same: those of one that the plan has no edit for go to the other."""
    depth, width, finetune = steps
    if not kinds - {"depth"}:
        depth, width = depth + width, 1
    elif "depth" not in kinds:
        depth, width = 1, depth + width
    return {"depth": depth, "width": width, "finetune": finetune}


def clear(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else; mark the folder as a demo's. Raises PpclError where
    `out` is a file, holds what no demo left where this one writes, or cannot be written.
    """
    there = [out / name for name in LEAVES if os.path.lexists(out / name)]
    if there and not owned.says(out / MARK, {"kind": "demo"}):
        raise PpclError(f"{there[0]}: is there, and no demo left it; choose another --out, or remove it")
    for path in there:
        owned.check_no_link(path)
        if path.is_dir():
            owned.check_replaceable(path, owned.DEMO.folders[path.name])
    try:
        for path in there:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARK, {"kind": "demo"})
    except OSError as error:
        raise PpclError(f"{out}: cannot be used as output ({error.strerror}); choose another --out") from error


def parse(arguments: list[str] | None = None) -> DemoSettings:
    """Read the command line. Raises PpclError where an option's value makes no sense."""
    plain = DemoSettings(Path("build/demo"))
    parser = argparse.ArgumentParser(prog="python -m ppcl_fx.demo", description=(__doc__ or "").splitlines()[0])
    for flag, default, words in (
        ("--out", plain.out, "folder for the results (%(default)s)"),
        ("--steps", ",".join(map(str, plain.steps)), "of depth, width and fine-tuning (%(default)s)"),
        ("--per-category", plain.per_category, "prompts scored a category (%(default)s)"),
        ("--variant", plain.variant, f"one of {', '.join(VARIANTS)} (%(default)s)"),
        ("--keep", ",".join(map(str, plain.keeps)), "ratios, the teacher's 1.0 first (%(default)s)"),
        ("--recorded", plain.recorded, "recordings of each prompt (%(default)s)"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=words)
    parser.add_argument("--weights", type=Path, help="another shapes pipeline, as ppcl_fx.shapes.teach writes it")
    given = vars(parser.parse_args(arguments))
    variant = given["variant"]
    if variant not in VARIANTS:
        raise PpclError(f"--variant {variant}: unknown{near(variant, VARIANTS)}; it is one of {', '.join(VARIANTS)}")
    for name in ("per_category", "recorded"):
        if given[name] < 1:
            raise PpclError(f"--{name.replace('_', '-')} is {given[name]}; give 1 or more")
    steps, keeps = parse_steps(given.pop("steps")), parse_keeps(given.pop("keep"))
    return DemoSettings(**given, steps=steps, keeps=keeps)


def parse_steps(text: str) -> tuple[int, int, int]:
    """Return the three numbers of "600,200,100"; PpclError where they are not three whole numbers of 1 or more."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        how = "give three numbers of 1 or more, for depth, width and fine-tuning: 600,200,100"
        raise PpclError(f"--steps {text}: {how}")
    depth, width, finetune = (int(part) for part in parts)
    return depth, width, finetune


def parse_keeps(text: str) -> tuple[float, ...]:
    """Return the shares of "1.0,0.7,0.5": 1.0 first, then falling. Raises PpclError where they are not that."""
    try:
        keeps = tuple(float(part) for part in text.split(","))
    except ValueError:
        keeps = ()
    falling = all(after < before for before, after in itertools.pairwise(keeps))
    if len(keeps) < 2 or keeps[0] != 1.0 or not falling or keeps[-1] <= 0:
        raise PpclError(f"--keep {text}: give 1.0 (the teacher) and then falling shares above 0: 1.0,0.7,0.5")
    return keeps


def main(arguments: list[str] | None = None) -> int:
    """Run the demo from the command line; return the exit code (2: one line on stderr says what to mend)."""
    begin = time.perf_counter()
    try:
        settings = parse(arguments)
        clear(settings.out)
        from ppcl_fx.demo_results import run  # slow: what is wrong is said first

        typed = sys.argv[1:] if arguments is None else arguments
        run(settings, shlex.join(["python", "-m", "ppcl_fx.demo", *typed]))
    except PpclError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - begin:.0f} s in all. Report: {settings.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
