"""How much quicker and smaller the students are than their teacher: eager, compiled, in onnxruntime and in TensorRT.

    python -m benchmarks.latency                              # shapes, and Qwen-Image and FLUX at small sizes
    python -m benchmarks.latency --size full --device cuda    # Qwen-Image 1328x1328 and FLUX 1024x1024 in bf16

Each variant (a runtime and a ratio) is a process of its own. Those of one runtime take turns, so that a slow moment
hits all of them: in each round each runs twice, and the second time counts. A speed-up is the median over the rounds
of the teacher's time over the student's. Where a runtime's variants do not fit into memory together they run one after
another, the teacher first and last. One block of each list is timed in the same rounds, with the inputs that it has in
the model. Memory: see `benchmarks.latency_worker`; it is the transformer's alone, and the paper does not say what its
own includes. What cannot be measured is in the result with its reason.

Weights are random. The paper's numbers are those of its Table 1, from other machines and the real sizes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import RESULTS, parser
from benchmarks.latency_models import DTYPES, SIZES, TABLE_1, Spec, specs, stored_bytes
from benchmarks.latency_worker import BLOCK, ENGINES, ONNXRUNTIME, RTX, RUNTIMES, Job, Worker
from ppcl_fx.errors import PpclError, near
from ppcl_fx.io.files import need_room, write_json
from ppcl_fx.io.memory import size_words
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.report.machine import describe, slug

GIB = 2**30
PROCESS = GIB // 2
"""Bytes that a process takes besides the weights: libraries, activations of a small model."""


@dataclass(frozen=True)
class Subject:
    """A model to measure: teacher and students without weights, and the edits plugged at each ratio."""

    spec: Spec
    model: PluggableModel
    students: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, spec: Spec) -> Subject:
        """Trace and rewrite a model, and choose the students of its ratios."""
        model = spec.pluggable()
        return cls(spec, model, tuple(ratio.students(model) for ratio in spec.ratios))


@dataclass
class Measured:
    """What one process gave: what it said of itself, milliseconds by part of the model, memory; or why nothing."""

    facts: dict[str, Any] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    def take(self, answer: dict[str, Any]) -> bool:
        """Keep the times of an answer; tell whether there were any."""
        self.failed = answer.get("failed", self.failed)
        if self.failed is None:
            for name, milliseconds in answer.items():
                self.times.setdefault(name, []).append(milliseconds)
        return self.failed is None


# ---- what is there -------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free where the models are to run."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def check_fits(spec: Spec, device: torch.device) -> None:
    """Raise `PpclError` where not even the teacher fits into memory."""
    needed, free = _needs(spec, spec.teacher_params()), free_memory(device)
    if needed > free:
        raise PpclError(
            f"{spec.title}: the teacher needs {size_words(needed)} on {device}, and {size_words(free)} are free; "
            "take a larger machine, or --size small"
        )


def _needs(spec: Spec, params: int) -> int:
    return round(1.1 * params * DTYPES[spec.dtype].itemsize) + PROCESS


def check_runtime(runtime: str, subject: Subject, device: torch.device, folder: Path) -> None:
    """Raise `PpclError` where a runtime cannot run a model here, or its files cannot be written."""
    if runtime not in ENGINES:
        return
    from ppcl_fx.export.extras import check_export
    from ppcl_fx.export.runtime.sessions import provider
    from ppcl_fx.export.tensorrt_api import load_tensorrt

    check_export()
    if runtime == ONNXRUNTIME:
        provider(runtime, device)
        if device.type == "cpu" and subject.spec.dtype == "bf16":
            raise PpclError("onnxruntime has no bfloat16 kernels for the CPU; --dtype fp32 runs there")
    elif device.type != "cuda":
        raise PpclError(f"TensorRT runs on NVIDIA GPUs, not on {device}")
    else:
        load_tensorrt("the other runtimes are measured", device.index or 0, "rtx" if runtime == RTX else "tensorrt")
    # The weights, and in float32 the two copies with which each file is compared to PyTorch.
    size = stored_bytes(subject.model)
    needed, free = size * (4 if subject.spec.dtype == "fp32" else 2), free_memory(torch.device("cpu"))
    if needed > free:
        raise PpclError(f"exporting takes {size_words(needed)} of memory, and {size_words(free)} are free")
    need_room(folder, size)


# ---- measuring -----------------------------------------------------------------------------------------------------


def turns(jobs: Mapping[str, Job], repeats: int, *, together: bool) -> dict[str, Measured]:
    """Run variants in turns, or one after another with the first once more at the end."""
    found = {label: Measured() for label in jobs}
    groups = [list(jobs)] if together else [*([label] for label in jobs), list(jobs)[:1]]
    for group in groups:
        workers: dict[str, Worker] = {}
        try:
            # Engines say what they take of a GPU by what is free before and after: one begins when the last is ready.
            alone = any(job.runtime in ENGINES and job.device != "cpu" for job in jobs.values())
            for label in group:
                workers[label] = Worker(jobs[label])
                if alone:
                    _ready(workers, label, found[label])
            for label in group:
                if not alone:
                    _ready(workers, label, found[label])
            for number in range(repeats):
                for label in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                    if not found[label].take(workers[label].ask("run")):
                        workers.pop(label).close()
            for label, worker in workers.items():
                answer = worker.ask("memory")
                found[label].failed = answer.get("failed")
                found[label].memory = answer
        finally:
            for worker in workers.values():
                worker.close()
    return found


def _ready(workers: dict[str, Worker], label: str, found: Measured) -> None:
    answer = workers[label].answer()
    found.failed = answer.get("failed")
    if found.failed is None:
        found.facts = answer
    else:
        workers.pop(label).close()


def measure(subject: Subject, runtime: str, device: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Return what one runtime gives for every ratio of a model, or why it gives nothing."""
    spec, model = subject.spec, subject.model
    folder = scratch / spec.name / re.sub(r"\W", "-", runtime)

    def job(task: str, number: int = 0) -> Job:
        keep, students = spec.ratios[number].keep, subject.students[number]
        return Job(spec, task, runtime, keep, students, device, folder, torch.get_num_threads())

    try:
        check_runtime(runtime, subject, torch.device(device), scratch)
        if runtime in ENGINES:
            exporter = Worker(job("export"))
            try:
                answer = exporter.answer()
            finally:
                exporter.close()
            if "failed" in answer:
                raise PpclError(f"the export failed: {answer['failed']}")
        jobs = {f"{r.keep:g}": job("whole", number) for number, r in enumerate(spec.ratios)}
        sizes = [_needs(spec, model.param_count(students)) for students in subject.students]
        together = sum(sizes) + PROCESS < free_memory(torch.device(device))
        found = turns({**jobs, BLOCK: job(BLOCK)}, repeats, together=together)
    except PpclError as error:
        return {"not_measured": [str(error)]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    teacher, block = found[f"{spec.ratios[0].keep:g}"], found.pop(BLOCK)
    if teacher.failed is not None:
        return {"not_measured": [teacher.failed]}
    lost = [f"{label}: {one.failed}" for label, one in {**found, BLOCK: block}.items() if one.failed is not None]
    blocks = {name: round(statistics.median(times), 3) for name, times in block.times.items()}
    rows = [
        row(subject, number, found[label], teacher, blocks)
        for number, label in enumerate(jobs)
        if found[label].failed is None
    ]
    return {
        "turns": "alternating" if together else "one after another",
        "repeats": repeats,
        "block_ms": blocks,
        "rows": rows,
        "not_measured": lost,
    }


def row(
    subject: Subject, number: int, one: Measured, teacher: Measured, blocks: Mapping[str, float]
) -> dict[str, Any]:
    """Return what is known of one ratio in one runtime."""
    ratio, model = subject.spec.ratios[number], subject.model
    times, base = one.times["whole"], teacher.times["whole"]
    # Of one round; where variants ran one after another there are no rounds, only all times of the teacher.
    paired = [b / t for b, t in zip(base, times, strict=True)] if len(base) == len(times) else []
    median, params = statistics.median(times), int(one.facts["params"])
    left = blocks_left(model, subject.students[number])
    result: dict[str, Any] = {
        "keep": ratio.keep,
        "params": params,
        "share": round(params / model.teacher_params, 4),
        "blocks": left,
        "ms": round(median, 3),
        "ms_quartiles": _quartiles(times),
        "speedup": round(statistics.median(paired) if paired else statistics.median(base) / median, 3),
        "speedup_quartiles": _quartiles(paired) if paired else None,
        **one.memory,
        "memory_pct": round(100 * one.memory["peak_gib"] / max(teacher.memory["peak_gib"], 1e-3), 1),
        "ready_seconds": one.facts["ready_seconds"],
    }
    if blocks:
        result["blocks_times_count_ms"] = round(sum(blocks[name] * count for name, count in left.items()), 3)
    if ratio.paper:
        paper = TABLE_1[ratio.paper]
        result["paper"] = {"speedup": paper.speedup, **paper.model_dump()}
    return result


def _quartiles(values: Sequence[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, 3), round(third, 3)]


def blocks_left(model: PluggableModel, students: Sequence[str]) -> dict[str, int]:
    """Return how many blocks of each list a mixture runs; those without a text stream count too."""
    left = dict(Counter(path.rpartition(".")[0] for path in model.graph.meta["ppcl"]["blocks"]))
    for edit in model.plan.depth():
        if edit.id in students:
            left[edit.stack] -= edit.last - edit.first
    return left


# ---- putting it together -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    made = _parser()
    options = made.parse_args(arguments)
    scratch = Path(tempfile.mkdtemp(prefix="ppcl-latency-", dir=options.scratch))
    try:
        return _measure_all(options, scratch)
    except PpclError as error:
        made.exit(2, f"{error}\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure_all(options: argparse.Namespace, scratch: Path) -> Path:
    wanted = options.runtimes.split(",")
    for name in wanted:
        if name not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            raise PpclError(f"--runtimes {name}: no such runtime{near(name, RUNTIMES)}; there are {known}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PpclError("--device cuda: PyTorch sees no GPU here; --device cpu measures on the processor")
    if options.repeats is not None and options.repeats < 2:
        raise PpclError("--repeats: two or more, since quartiles are given")
    found = specs(options.size, options.dtype, options.models.split(",") if options.models else [])
    for spec in found:
        check_fits(spec, device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    result: dict[str, Any] = {
        "what": "latency",
        **describe(
            ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-libs", "ppcl-fx")
        ),
        "device": gpu or "cpu",
        "threads": torch.get_num_threads(),
        "size": options.size,
        "conditions": options.note,
        "weights": "random",
        "paper": "Table 1; its latencies and memory are of other machines, of the real sizes, and of trained models",
        "models": [],
    }
    machine = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or slug()
    name = f"{machine}-latency.json" if options.size == "small" else f"{machine}-latency-{options.size}.json"
    path: Path = options.out or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for spec in found:
        subject = Subject.of(spec)
        print(f"\n{spec.title}, {spec.dtype}")
        runtimes: dict[str, Any] = {}
        entry = {
            "name": spec.name,
            "title": spec.title,
            "dtype": spec.dtype,
            "inputs": spec.shapes(),
            "teacher_params": subject.model.teacher_params,
            "plan": [edit.id for edit in spec.plan.edits],
            "runtimes": runtimes,
        }
        result["models"].append(entry)
        for runtime in wanted:
            repeats = options.repeats or spec.repeats
            runtimes[runtime] = measure(subject, runtime, options.device, scratch, repeats)
            write_json(path, result)  # after each: a long measurement that is cut short is not lost
            show(runtime, runtimes[runtime])
    print(path)
    return path


def show(runtime: str, found: Mapping[str, Any]) -> None:
    """Print one runtime's rows."""
    for one in found.get("rows", ()):
        spread = "–".join(f"{ms:.1f}" for ms in one["ms_quartiles"])
        line = (
            f"  {runtime:<13} {one['params']:>14,} {100 * one['share']:5.1f} %  {one['ms']:8.1f} ms ({spread})"
            f"  {one['speedup']:.2f}x  {one['peak_gib']:6.2f} GiB {one['memory_pct']:5.1f} %"
        )
        if "paper" in one:
            line += f"   paper: {one['paper']['speedup']:.2f}x, {one['paper']['memory_pct']} %"
        print(line)
    if found.get("block_ms"):
        teacher = found["rows"][0]
        terms = " + ".join(f"{teacher['blocks'][name]} x {ms:.2f}" for name, ms in found["block_ms"].items())
        total = teacher["blocks_times_count_ms"]
        print(f"  {runtime:<13} blocks alone: {terms} = {total:.1f} of {teacher['ms']:.1f} ms")
    for line in found["not_measured"]:
        print(f"  {runtime:<13} not measured: {line}")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    made = parser(
        "latency",
        __doc__,
        size=("small", ", ".join(SIZES)),
        models=("", "some of the size's models, with commas between"),
        runtimes=(",".join(RUNTIMES), "with commas between"),
        device=("cpu", "where to run"),
        note=("", "what else the machine did, for the result"),
    )
    made.add_argument("--dtype", choices=DTYPES, default=None, help="default: fp32; full size: bf16")
    made.add_argument("--repeats", type=int, default=None, help="timed runs of each variant (default: by model)")
    made.add_argument("--scratch", default=None, help="folder for exported files (default: the system's)")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
