"""A schedule in words: what a person reads before a long training starts."""

from __future__ import annotations

from ppcl_fx.io.memory import size_words
from ppcl_fx.train.bounded.costs import Speeds
from ppcl_fx.train.bounded.schedule import Capacity, Price, Schedule, StageSchedule

_WAYS = {
    "cached": "the teacher runs once, and its states at the students' borders are cached",
    "cached in turns": "the teacher runs once for each set of students, and its states at their borders are cached",
    "recomputed": "the teacher runs again before each part of the steps, on the calls of that part",
}


def schedule_lines(stage: StageSchedule, capacity: Capacity, base: int, speeds: Speeds) -> list[str]:
    """Return a stage's schedule in a few lines.

    Args:
        stage: the stage.
        capacity: what may be used.
        base: bytes that the process held before.
        speeds: what the estimate of the time rests on.
    """
    chosen = stage.schedule
    if chosen is None:
        return [f"stage {stage.stage}: every student is finished"]
    price = chosen.price
    lines = [
        f"stage {stage.stage}: {_count(len(stage.students), 'student')}, {stage.steps} steps, "
        f"{chosen.at_once} at a time",
        f"  {chosen.kind}: {_WAYS[chosen.kind]} ({_parts(chosen)})",
        f"  memory: {size_words(base + price.memory)}{_of(base + capacity.memory)}, "
        f"{size_words(price.cache_memory)} of it for the cache",
        f"  disk: {size_words(chosen.disk)} of {size_words(capacity.disk)}, {size_words(price.cache_disk)} of it for "
        "the cache and the teacher's states",
        f"  work: {price.teacher_flops:.3g} FLOPs of the teacher, {price.training_flops:.3g} of the students",
        f"  time: about {duration(price.seconds)}, at {speeds.flops / 1e9:.0f} GFLOP/s and "
        f"{speeds.write / 2**20:.0f} MiB/s",
    ]
    return [*lines, *(_instead(name, other) for name, other in chosen.alternatives)]


def duration(seconds: float) -> str:
    """Write a time for a person."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _of(limit: int) -> str:
    return f" of {size_words(limit)}" if limit < 2**60 else ""


def _parts(chosen: Schedule) -> str:
    return _count(chosen.price.passes, "pass", "passes")


def _instead(name: str, other: Price) -> str:
    return (
        f"  instead {name}: about {duration(other.seconds)}, {_count(other.passes, 'pass', 'passes')}, "
        f"{size_words(other.cache_disk)} of cache on disk"
    )


def _count(count: int, noun: str, many: str = "") -> str:
    return f"{count} {noun if count == 1 else many or noun + 's'}"
