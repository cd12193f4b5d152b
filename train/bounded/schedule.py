"""The schedule: which students train at a time, and whether the teacher's values are cached or recomputed for them.

It is a pure function of costs and limits: `Pricing.plan` prices every way of doing the work and takes the fastest that
fits (of two that are about as fast the plainer one).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ppcl_fx.errors import PpclError
from ppcl_fx.io.memory import size_words
from ppcl_fx.train.bounded.costs import ProblemCost, Speeds, TeacherCost
from ppcl_fx.train.config import NO_LIMIT

CLEARLY = 0.98
"""A way takes the place of a plainer one, or one with more students at a time, for less than this share of its time."""
MARGIN = 2**28
"""Bytes of the memory limit that are left for what no estimate sees: the allocator, libraries, the interpreter."""
KINDS = {
    "cached": "the teacher runs once, and its states at the students' borders are cached",
    "cached in turns": "the teacher runs once for each set of students, and its states at their borders are cached",
    "recomputed": "the teacher runs again before each part of the steps, on the calls of that part",
}
"""How a schedule gets the teacher's values, the plainest first."""


@dataclass(frozen=True)
class Capacity:
    """What may be used: bytes of memory beside what the process holds already, of disk, and of the memory for the
    cache at most.
    """

    memory: int
    disk: int
    cache_memory: int = NO_LIMIT

    @property
    def free(self) -> int:
        """Bytes of memory that estimates may fill."""
        return self.memory - MARGIN


@dataclass(frozen=True)
class PricedWork:
    """Which calls the steps use."""

    order: Sequence[tuple[int, ...]]  # for each step the positions of its calls
    scales: Sequence[float]  # for each call its size over that of the traced call
    held_out: Sequence[int] = ()  # positions of the calls that the students are evaluated on
    evaluate_every: int = 1  # steps between evaluations; the last step has one in any case

    def evaluations(self, start: int, stop: int) -> int:
        """Return how often the students are evaluated after a step from `start` on and before `stop`."""
        done = range(start + 1, stop + 1) if self.held_out else ()
        return sum(count % self.evaluate_every == 0 or count == len(self.order) for count in done)

    def calls(self, start: int, stop: int) -> list[int]:
        """Return the positions of the calls that steps and evaluations of a part need, each once and in order."""
        trained = {call for step in self.order[start:stop] for call in step}
        return sorted(trained | set(self.held_out if self.evaluations(start, stop) else ()))

    def trained(self, start: int, stop: int) -> float:
        """Return the summed size of the calls of all steps of a part."""
        return sum(self.scales[call] for step in self.order[start:stop] for call in step)

    def looked_at(self, start: int, stop: int) -> float:
        """Return the summed size of the calls of all evaluations of a part."""
        return self.evaluations(start, stop) * sum(self.scales[call] for call in self.held_out)

    def largest(self) -> float:
        """Size of the largest call over that of the traced one."""
        return max(self.scales)


@dataclass(frozen=True)
class Sweep:
    """Students that the teacher runs for together."""

    groups: tuple[tuple[int, ...], ...]  # problems by number; a group's train side by side, one group after the other
    windows: tuple[tuple[int, int], ...]  # first step and one after the last, of each part that the teacher runs before

    @property
    def problems(self) -> tuple[int, ...]:
        """The problems of all groups."""
        return tuple(number for group in self.groups for number in group)


class Price(NamedTuple):
    """What a schedule costs: four sums, and three values that are the most of any sweep."""

    seconds: float  # estimate of the time
    teacher_flops: float  # of all passes of the teacher
    training_flops: float  # of all steps and evaluations of all students, none of them stopped early
    passes: int  # runs of the teacher
    memory: int  # bytes in memory beside what the process held before
    cache_memory: int  # of which for the cache
    cache_disk: int  # bytes of the cache and of the teacher's states on disk


@dataclass(frozen=True)
class Schedule:
    """A way of doing the work: how it gets the teacher's values (one of `KINDS`), and what is done in order."""

    kind: str
    sweeps: tuple[Sweep, ...]
    price: Price
    disk: int  # bytes that it takes in all: cache, checkpoints, finished students, the new students' file
    alternatives: tuple[tuple[str, Price], ...] = ()  # the fastest of each other kind

    @property
    def at_once(self) -> int:
        """The most students that train at a time."""
        return max(len(group) for sweep in self.sweeps for group in sweep.groups)

    def beats(self, other: Schedule | None) -> bool:
        """Tell whether this takes the place of a plainer way, or of none."""
        return other is None or self.price.seconds < CLEARLY * other.price.seconds


@dataclass(frozen=True)
class StageSchedule:
    """What is going to be done for a stage: the way, and the costs that it rests on.

    `students` are the ids of the edits that are not finished yet; there is no schedule where all of them are.
    """

    stage: str
    steps: int
    students: tuple[str, ...]
    schedule: Schedule | None
    costs: tuple[ProblemCost, ...] = ()
    teacher: TeacherCost | None = None

    def lines(self, capacity: Capacity, base: int, speeds: Speeds) -> list[str]:
        """Return it in a few lines, for a person before a long training starts; `base` are the bytes of the process."""
        chosen = self.schedule
        if chosen is None:
            return [f"stage {self.stage}: every student is finished"]
        price = chosen.price
        limit = f" of {size_words(base + capacity.memory)}" if base + capacity.memory < 2**60 else ""
        return [
            f"stage {self.stage}: {_count(len(self.students), 'student')}, {self.steps} steps, "
            f"{chosen.at_once} at a time",
            f"  {chosen.kind}: {KINDS[chosen.kind]} ({_count(price.passes, 'pass', 'passes')})",
            f"  memory: {size_words(base + price.memory)}{limit}, {size_words(price.cache_memory)} of it for the cache",
            f"  disk: {size_words(chosen.disk)} of {size_words(capacity.disk)}, {size_words(price.cache_disk)} of it "
            "for the cache and the teacher's states",
            f"  work: {price.teacher_flops:.3g} FLOPs of the teacher, {price.training_flops:.3g} of the students",
            f"  time: about {_duration(price.seconds)}, at {speeds.flops / 1e9:.0f} GFLOP/s and "
            f"{speeds.write / 2**20:.0f} MiB/s",
            *(
                f"  instead {name}: about {_duration(other.seconds)}, {_count(other.passes, 'pass', 'passes')}, "
                f"{size_words(other.cache_disk)} of cache on disk"
                for name, other in chosen.alternatives
            ),
        ]


@dataclass(frozen=True)
class Pricing:
    """Prices the ways of training a stage; `problems` are the students, in the order of the teacher's blocks."""

    problems: Sequence[ProblemCost]
    teacher: TeacherCost
    work: PricedWork
    capacity: Capacity
    speeds: Speeds

    def plan(self, checkpoints: int) -> Schedule:
        """Choose the fastest way that fits; of a student so many checkpoints lie on the disk at a time. Raises
        PpclError where one student alone, or the teacher's heaviest block, needs more memory, or the disk is too
        small.
        """
        self._check_memory()
        problems, limit = self.problems, self.capacity.disk
        # Each trained weight once as a finished student's file, once in the new students' file.
        fixed = 2 * sum(problem.weights for problem in problems)
        best: dict[str, Schedule] = {}
        too_large: list[int] = []
        for kind, sweeps in self._candidates():
            if max(max(self._phases(sweep)) for sweep in sweeps) > self.capacity.free:
                continue
            columns = list(zip(*(self._price(sweep) for sweep in sweeps), strict=True))
            price = Price(*map(sum, columns[:4]), *map(max, columns[4:]))
            training = max(sum(problems[n].saved for n in group) for sweep in sweeps for group in sweep.groups)
            found = Schedule(kind, sweeps, price, fixed + checkpoints * training + price.cache_disk)
            if found.disk > limit:
                too_large.append(found.disk)
            elif found.beats(best.get(kind)):
                best[kind] = found
        if not best:
            raise PpclError(
                f"--disk-limit {size_words(limit)}: too small for this training; give at least "
                f"{size_words(min(too_large))}"
            )
        ways = [best[kind] for kind in KINDS if kind in best]
        chosen = ways[0]
        for way in ways[1:]:
            chosen = way if way.beats(chosen) else chosen
        return replace(chosen, alternatives=tuple((way.kind, way.price) for way in ways if way is not chosen))

    def cache_room(self, sweep: Sweep) -> int:
        """Return how many bytes of memory the cache may hold while a sweep is done."""
        return max(0, min(self.capacity.cache_memory, self.capacity.free - max(self._phases(sweep))))

    def _check_memory(self) -> None:
        scale, teacher = self.work.largest(), self.teacher
        need = max(problem.held + int(scale * problem.step) for problem in self.problems)
        need = max(need, teacher.block + int(scale * max(teacher.states, default=0)))
        if need > self.capacity.free:
            raise PpclError(
                f"--memory-limit: too small by {size_words(need - self.capacity.free)} for the largest student or "
                "block; give that much more, or shorter calls"
            )

    def _candidates(self) -> Iterator[tuple[str, tuple[Sweep, ...]]]:
        """Every way of doing the work with its kind, those with more students at a time first.

        Fewer students at a time leave memory for the cache. The teacher runs for all of them at once, or for some and
        then for others; or it runs before each of several parts of the steps, on the calls of that part alone. One part
        is the plain cache. With as many parts as steps the cache never holds more than a batch.
        """
        steps = len(self.work.order)
        seen: set[tuple[tuple[int, ...], ...]] = set()
        for at_once in range(len(self.problems), 0, -1):
            groups = self._groups(at_once)
            if groups in seen:
                continue
            seen.add(groups)
            for together in range(len(groups), 0, -1):
                sets = [groups[i : i + together] for i in range(0, len(groups), together)]
                kind = "cached" if len(sets) == 1 else "cached in turns"
                yield kind, tuple(Sweep(part, ((0, steps),)) for part in sets)
            count = 2
            while count < 2 * steps:
                edges = [round(i * steps / min(count, steps)) for i in range(min(count, steps) + 1)]
                windows = tuple((a, b) for a, b in pairwise(edges) if a < b)
                # A part's students stay in memory to the end of the steps, so a sweep has one group here.
                yield "recomputed", tuple(Sweep((group,), windows) for group in groups)
                count *= 2

    def _groups(self, at_once: int) -> tuple[tuple[int, ...], ...]:
        """Fill groups with problems in order, as long as they fit into memory."""
        groups: list[list[int]] = []
        held = step = 0
        for number, problem in enumerate(self.problems):
            more = int(self.work.largest() * problem.step)
            room = self.capacity.free - problem.held - max(step, more)
            if groups and len(groups[-1]) < at_once and held <= room:
                groups[-1].append(number)
                held, step = held + problem.held, max(step, more)
            else:
                groups.append([number])
                held, step = problem.held, more
        return tuple(tuple(group) for group in groups)

    def _phases(self, sweep: Sweep) -> tuple[int, int]:
        """Return the most bytes in memory while students train, and while the teacher runs, both without the cache."""
        problems, largest = self.problems, self.work.largest()
        training = max(
            sum(problems[n].held for n in group) + int(largest * max(problems[n].step for n in group))
            for group in sweep.groups
        )
        # With several parts the students stay in memory while the teacher runs.
        beside = sum(problems[n].held for n in sweep.problems) if len(sweep.windows) > 1 else 0
        return training, beside + self.teacher.block

    def _price(self, sweep: Sweep) -> Price:
        """Return what a sweep costs."""
        teacher, work, speeds = self.teacher, self.work, self.speeds
        mine = [self.problems[number] for number in sweep.problems]
        one_call = sum({name: size for problem in mine for name, size in problem.border.items()}.values())
        last = max(problem.last for problem in mine)
        training, running = self._phases(sweep)
        room = self.cache_room(sweep)
        states = max(teacher.states[: last + 1], default=0)
        flops, weights = sum(teacher.flops[: last + 1]), sum(teacher.weights[: last + 1])
        seconds = teacher_flops = 0.0
        most_memory = most_disk = 0
        for start, stop in sweep.windows:
            distinct = sum(work.scales[call] for call in work.calls(start, stop))
            reads = work.trained(start, stop) + work.looked_at(start, stop)
            cached = int(distinct * one_call)
            held = min(cached, room)
            spilled = max(0, int(distinct * states) - max(0, self.capacity.free - running - held))
            share = (cached - held) / cached if cached else 0.0
            teacher_flops += distinct * flops
            seconds += distinct * flops / speeds.flops + weights / speeds.read
            seconds += (last + 1) * spilled * (1 / speeds.write + 1 / speeds.read)
            # Every group reads the values that its own students need, at each step and evaluation.
            seconds += (cached - held) / speeds.write + reads * one_call * share / speeds.read
            most_memory, most_disk = max(most_memory, held), max(most_disk, cached - held + spilled)
        steps = len(work.order)
        # An evaluation is a forward pass, a third of a step.
        passes = work.trained(0, steps) + work.looked_at(0, steps) / 3
        training_flops = passes * sum(problem.flops for problem in mine)
        return Price(
            seconds + training_flops / speeds.flops,
            teacher_flops,
            training_flops,
            len(sweep.windows),
            most_memory + max(training, running),
            most_memory,
            most_disk,
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _count(count: int, noun: str, many: str = "") -> str:
    return f"{count} {noun if count == 1 else many or noun + 's'}"
