"""The schedule: which students train at a time, and whether the teacher's values are cached or recomputed for them.

`Pricing.plan` is a pure function of costs and limits. It prices every way of doing the work and takes the fastest that
fits (of two that are about as fast the plainer one):

- how many students are in memory at a time: as many as fit, or fewer, which leaves memory for the cache;
- how many sets of students the teacher runs for: one run for all of them fills the largest cache;
- in how many parts the steps are done: before each part the teacher runs on the calls of that part alone. One part is
  the plain cache: each call goes through the teacher once. As many parts as steps is recomputing: the teacher runs at
  each step, and the cache never holds more than a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ppcl_fx.errors import PpclError
from ppcl_fx.io.memory import size_words
from ppcl_fx.train.bounded.costs import ProblemCost, Speeds, TeacherCost

CLEARLY = 0.98
"""A way takes the place of a plainer one, or one with more students at a time, for less than this share of its time."""
MARGIN = 2**28
"""Bytes of the memory limit that are left for what no estimate sees: the allocator, libraries, the interpreter."""


@dataclass(frozen=True)
class Capacity:
    """What may be used.

    Attributes:
        memory: bytes beside what the process holds already.
        disk: bytes of disk.
        cache_memory: bytes of the memory that the cache may take at most.
    """

    memory: int
    disk: int
    cache_memory: int = 2**62

    @property
    def free(self) -> int:
        """Bytes of memory that estimates may fill."""
        return self.memory - MARGIN


@dataclass(frozen=True)
class PricedWork:
    """Which calls the steps use.

    Attributes:
        order: for each step the positions of its calls.
        scales: for each call its size over that of the traced call.
        held_out: positions of the calls that the students are evaluated on.
        evaluate_every: steps between evaluations; the last step has one in any case.
    """

    order: Sequence[tuple[int, ...]]
    scales: Sequence[float]
    held_out: Sequence[int] = ()
    evaluate_every: int = 1

    def evaluated(self, done: int) -> bool:
        """Tell whether the students are evaluated once so many steps are done."""
        return bool(self.held_out) and (done % self.evaluate_every == 0 or done == len(self.order))

    def evaluations(self, start: int, stop: int) -> int:
        """Return how often the students are evaluated after a step from `start` on and before `stop`."""
        return sum(self.evaluated(step + 1) for step in range(start, stop))

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
    """Students that the teacher runs for together.

    Attributes:
        groups: problems by number; those of a group train at the same time, the groups one after the other.
        windows: first step, and one after the last, of the parts; before each one the teacher runs on its calls.
    """

    groups: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, int], ...]

    @property
    def problems(self) -> tuple[int, ...]:
        """The problems of all groups."""
        return tuple(number for group in self.groups for number in group)


@dataclass(frozen=True)
class Price:
    """What a schedule costs.

    Attributes:
        seconds: estimate of the time.
        teacher_flops: of all passes of the teacher.
        training_flops: of all steps and evaluations of all students, none of them stopped early.
        passes: runs of the teacher.
        memory: the most bytes in memory beside what the process held before.
        cache_memory: of which for the cache.
        cache_disk: the most bytes of the cache and of the teacher's states on disk.
    """

    seconds: float
    teacher_flops: float
    training_flops: float
    passes: int
    memory: int
    cache_memory: int
    cache_disk: int


@dataclass(frozen=True)
class Schedule:
    """The way that was chosen.

    Attributes:
        sweeps: what is done, in order.
        price: what it costs.
        disk: bytes of disk that it takes in all: cache, checkpoints, finished students, the new students' file.
        alternatives: what else was possible, each a name and its price; the fastest of each kind.
    """

    sweeps: tuple[Sweep, ...]
    price: Price
    disk: int
    alternatives: tuple[tuple[str, Price], ...]

    @property
    def kind(self) -> str:
        """ "cached" or "recomputed"."""
        return kind(self.sweeps)

    @property
    def at_once(self) -> int:
        """The most students that train at a time."""
        return max(len(group) for sweep in self.sweeps for group in sweep.groups)


@dataclass(frozen=True)
class StageSchedule:
    """What is going to be done for a stage.

    Attributes:
        stage: its name.
        steps: its steps.
        students: ids of the edits that are not finished yet.
        schedule: the way; None where every student is finished.
        costs: what the schedule rests on: each student's costs.
        teacher: and the teacher's.
    """

    stage: str
    steps: int
    students: tuple[str, ...]
    schedule: Schedule | None
    costs: tuple[ProblemCost, ...] = ()
    teacher: TeacherCost | None = None


KINDS = ("cached", "cached in turns", "recomputed")
"""How a schedule gets the teacher's values, the plainest first."""


def kind(sweeps: Sequence[Sweep]) -> str:
    """Say in a word how a schedule gets the teacher's values."""
    if any(len(sweep.windows) > 1 for sweep in sweeps):
        return "recomputed"
    return "cached" if len(sweeps) == 1 else "cached in turns"


@dataclass(frozen=True)
class Pricing:
    """Prices the ways of training a stage.

    Attributes:
        problems: the students, in the order of the teacher's blocks.
        teacher: the teacher's costs.
        work: the steps and their calls.
        capacity: what may be used.
        speeds: how fast the machine is.
    """

    problems: Sequence[ProblemCost]
    teacher: TeacherCost
    work: PricedWork
    capacity: Capacity
    speeds: Speeds

    def plan(self, checkpoints: int) -> Schedule:
        """Choose the fastest way that fits; of a student so many checkpoints lie on the disk at a time.

        Raises:
            PpclError: one student alone, or the teacher's heaviest block, needs more memory, or the disk is too small.
        """
        self._check_memory()
        problems, limit = self.problems, self.capacity.disk
        # Each trained weight once as a finished student's file, once in the new students' file.
        fixed = 2 * sum(problem.weights for problem in problems)
        best: dict[str, tuple[tuple[Sweep, ...], Price, int]] = {}
        too_large: list[int] = []
        for sweeps in self._candidates():
            price = self._price(sweeps)
            if price is None:
                continue
            training = max((sum(problems[n].saved for n in group) for s in sweeps for group in s.groups), default=0)
            disk = fixed + checkpoints * training + price.cache_disk
            name = kind(sweeps)
            if disk > limit:
                too_large.append(disk)
            elif name not in best or price.seconds < CLEARLY * best[name][1].seconds:
                best[name] = (sweeps, price, disk)
        if not best:
            raise PpclError(
                f"--disk-limit {size_words(limit)}: too small for this training; give at least "
                f"{size_words(min(too_large))}"
            )
        ways = [name for name in KINDS if name in best]
        chosen = ways[0]
        for name in ways[1:]:
            if best[name][1].seconds < CLEARLY * best[chosen][1].seconds:
                chosen = name
        return Schedule(*best[chosen], tuple((name, best[name][1]) for name in ways if name != chosen))

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

    def _candidates(self) -> Iterator[tuple[Sweep, ...]]:
        """Every way of doing the work, those with more students at a time first."""
        steps = len(self.work.order)
        seen: set[tuple[tuple[int, ...], ...]] = set()
        for at_once in range(len(self.problems), 0, -1):
            groups = self._groups(at_once)
            if groups in seen:
                continue
            seen.add(groups)
            for together in range(len(groups), 0, -1):
                parts = [groups[i : i + together] for i in range(0, len(groups), together)]
                yield tuple(Sweep(part, ((0, steps),)) for part in parts)
            count = 2
            while count < 2 * steps:
                # A part's students stay in memory to the end of the steps, so a sweep has one group here.
                windows = _windows(steps, min(count, steps))
                yield tuple(Sweep((group,), windows) for group in groups)
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

    def _price(self, sweeps: Sequence[Sweep]) -> Price | None:
        """Return what a way costs; None where it does not fit into memory."""
        prices: list[Price] = []
        for sweep in sweeps:
            one = self._sweep_price(sweep)
            if one is None:
                return None
            prices.append(one)
        return Price(
            sum(one.seconds for one in prices),
            sum(one.teacher_flops for one in prices),
            sum(one.training_flops for one in prices),
            sum(one.passes for one in prices),
            max(one.memory for one in prices),
            max(one.cache_memory for one in prices),
            max(one.cache_disk for one in prices),
        )

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

    def _sweep_price(self, sweep: Sweep) -> Price | None:
        teacher, work, speeds = self.teacher, self.work, self.speeds
        mine = [self.problems[number] for number in sweep.problems]
        border = {name: size for problem in mine for name, size in problem.border.items()}
        one_call = sum(border.values())
        last = max(problem.last for problem in mine)
        training, running = self._phases(sweep)
        if max(training, running) > self.capacity.free:
            return None
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


def _windows(steps: int, count: int) -> tuple[tuple[int, int], ...]:
    edges = [round(i * steps / count) for i in range(count + 1)]
    return tuple((a, b) for a, b in pairwise(edges) if a < b)
