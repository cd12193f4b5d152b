"""Options and paths of the command line: one of a command's arguments is changed to what it cannot be."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ppcl_fx.cli.app import main

WORDS = [
    "", " ", "0", "-1", "1", "2", "0.5", "1.5", "nan", "inf", "-inf", "1e20", "1e308", "99999999999999999999", "abc",
    "none",
    "null", "1,1", "1,2,3", ",", "[]", "{}", "GiB", "1e20GiB", "-5GiB", "0GiB", "../x", "~", "cpu", "cuda",
    "paper:none", "--help",
    "é", "\u202ered", "\x1b[31mred", "a\nb", "\udcff", "x" * 5000, "shapes", "depth", "depth,width", "/dev/zero",
    "/", ".",
]  # fmt: skip
"""What an option is given."""
PLACES = ["", "gone", "gone/deeper", "files/plan.json", "model", "pipe", "/dev/zero", "/dev/null", "loop",
    "a\x1b[31mb",
          "\udcff", "x" * 300, "/" + "x/" * 3000, ".", "..", "/", "~", "org/name/more", "s:hapes", "run",
          "student"]  # fmt: skip
"""What a path is given, within a folder that holds the undamaged inputs."""

COMMANDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "analyze": (
        ["analyze", "model", "-o", "out", "--calls", "run/calls"],
        ["--batch-size", "--steps", "--seed", "--stream", "--ridge", "--refine-steps", "--samples", "--memory-limit",
         "--device", "--calls", "-o", "--prompts"],
        ["model", "out", "run/calls"],
    ),
    "rewrite": (
        ["rewrite", "model", "-o", "out", "--analysis", "run/analysis.json"],
        ["--keep", "--params", "--latency", "--costs", "--plan", "--released", "--calls", "--init", "--select",
         "--memory-limit", "--device", "--analysis", "-o"],
        ["model", "out", "run/analysis.json"],
    ),
    "train": (
        ["train", "student", "--calls", "run/calls", "--dry-run"],
        ["--calls", "--out", "--stage", "--steps", "--lr", "--batch-size", "--seed", "--config", "--memory-limit",
        "--device",
         "--effects", "--prompts", "--pipeline", "--images", "--cache", "--log", "--log-every", "--compile-backend",
         "--weights",
         "--optimizer", "--keep", "--warmup", "--ema"],
        ["student", "run/calls"],
    ),
    "export": (
        ["export", "student", "-o", "out", "--keep", "0.1234"],
        ["--keep", "--format", "--calls", "--dtype", "--memory-limit", "--tolerance", "--check-calls", "--pipeline",
         "--samples", "--sample-steps", "--runs", "--tokens", "--batch", "--text", "--shapes", "--workspace", "-o"],
        ["student", "out"],
    ),
    "build": (["build", "engines"], ["--shapes", "--tokens", "--batch", "--size", "--workspace", "--level"],
    ["engines"]),
    "verify": (["verify", "student"], ["--json"], ["student"]),
}  # fmt: skip
"""A command line, the options that it is given, and which of its words are paths."""


def drawn(rng: random.Random) -> list[str]:
    """Return a command line with one argument that it cannot have."""
    arguments, options, paths = COMMANDS[rng.choice(sorted(COMMANDS))]
    if rng.random() < 0.4:
        place = arguments.index(rng.choice(paths))
        return [*arguments[:place], rng.choice(PLACES), *arguments[place + 1 :]]
    return [*arguments, rng.choice(options), rng.choice(WORDS)]


def run(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Run a command line in a folder, and return its exit code and what it said on stderr."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    here = Path.cwd()
    os.chdir(folder)
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(arguments)
    finally:
        os.chdir(here)
    return code, said.getvalue()


def fault(code: int, said: str) -> str | None:
    """Return what is wrong with the end of a command, if anything is."""
    lines = said.splitlines()
    if code == 0:
        return None
    if code != 2:
        return f"exit code {code}"
    if not lines or not lines[-1].startswith("ppcl-fx: "):
        return f"no line on stderr: {said[-200:]!r}"
    raw = [character for character in lines[-1] if not character.isprintable()]
    return f"unprintable {raw[0]!r} in {lines[-1]!r}" if raw else None


Runner = Callable[[Path, list[str]], tuple[int, str]]
