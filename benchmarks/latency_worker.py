"""The processes of `benchmarks.latency`: each holds one variant, runs it when it is told to, and says how long it took.

A variant in a process of its own has its own memory to be measured; and since it waits for its turn, the variants can
alternate.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from benchmarks.blocks import cut
from benchmarks.latency_models import Spec, materialise
from benchmarks.streaming import Peak
from benchmarks.streaming import held as resident
from ppcl_fx.errors import PpclError
from ppcl_fx.ir.stacks import stacks

EAGER, COMPILE, ONNXRUNTIME, TENSORRT, RTX = "eager", "torch.compile", "onnxruntime", "tensorrt", "rtx"
BLOCK = "block"
BUILT = (TENSORRT, RTX)
"""Runtimes that run engines, by the libraries that build them."""
RUNTIMES = (EAGER, COMPILE, ONNXRUNTIME, *BUILT)
ENGINES = (ONNXRUNTIME, *BUILT)
"""Runtimes that run exported files."""

WARM = 2
GIB = 2**30
REASONS = (PpclError, RuntimeError, ImportError, OSError, MemoryError)
"""What says that a variant cannot be measured here; anything else is an error of this program."""


@dataclass(frozen=True)
class Job:
    """What a process is to hold.

    Attributes:
        spec: the model.
        task: "whole" for one ratio, "block" for one block of each list, "export" to write the files of all ratios.
        runtime: one of `RUNTIMES`.
        keep: the ratio.
        students: the edits that are plugged in it.
        device: where to run.
        folder: where exported files lie.
        threads: PyTorch's on the CPU; onnxruntime has its own rule.
    """

    spec: Spec
    task: str
    runtime: str
    keep: float
    students: tuple[str, ...]
    device: str
    folder: Path
    threads: int


@dataclass
class Held:
    """What a process holds: functions to call, by the part of the model that they run, and what is known of it."""

    runs: dict[str, Callable[[], Any]]
    facts: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A process and the way to it.

    Args:
        job: what it is to hold.
    """

    def __init__(self, job: Job) -> None:
        # Not forked from this process, which has threads; and not started from nothing, which takes seconds each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._way, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, job), daemon=False)
        self._process.start()
        other.close()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer; ``failed`` in it is the reason why there is no other."""
        try:
            found: dict[str, Any] = self._way.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            found = {"failed": f"the process ended with exit code {self._process.exitcode} (out of memory?)"}
        return found

    def ask(self, command: str) -> dict[str, Any]:
        """Give a command (``run`` or ``memory``) and return the answer."""
        with contextlib.suppress(ConnectionError):  # the answer says that it has ended
            self._way.send(command)
        return self.answer()

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free again."""
        self._way.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve(way: Connection, job: Job) -> None:
    """Prepare a job, then do what is asked until nobody asks any more."""
    device = torch.device(job.device)
    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore")  # inductor has no complex numbers, and says so in every process
    gc.collect()
    before = _memory_now(device)
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            held = {"whole": whole, BLOCK: block, "export": exported}[job.task](job, device)
            for _ in range(WARM):
                for run in held.runs.values():
                    run()
            _wait(device)
            way.send({**held.facts, "ready_seconds": round(time.perf_counter() - begin, 1)})
            while True:
                command = way.recv()
                way.send(_timed(held, device) if command == "run" else _peak(job, held, device, before))
    except (EOFError, ConnectionError):
        return
    except REASONS as error:
        way.send({"failed": one_line(error)})


def one_line(error: BaseException) -> str:
    """Return an exception's kind and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else "no message"
    return words if isinstance(error, PpclError) else f"{type(error).__name__}: {words}"[:300]


def _timed(held: Held, device: torch.device) -> dict[str, float]:
    """Run each part twice and return the milliseconds of the second time: caches and threads are awake then."""
    found = {}
    for name, run in held.runs.items():
        run()
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        found[name] = 1e3 * (time.perf_counter() - begin)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory --------------------------------------------------------------------------------------------------------


def _memory_now(device: torch.device) -> tuple[int, int]:
    """Return bytes in use: on a GPU by everybody; on a CPU by this process, those no file backs, and all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total - free
    return resident()


def _peak(job: Job, held: Held, device: torch.device, before: tuple[int, int]) -> dict[str, float]:
    """Return the most memory that two runs take, in GiB.

    On a GPU it is what PyTorch has allocated, or what an engine has taken of the device. On a CPU it is what is
    resident above what was when the process began, mapped files included; and that without mapped files.
    """
    watch = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        watch.start()
    for run in (*held.runs.values(), *held.runs.values()):
        run()
    _wait(device)
    now = _memory_now(device)
    if device.type == "cuda":
        taken = now[0] - before[0] if job.runtime in ENGINES else torch.cuda.max_memory_allocated(device)
        return {"peak_gib": round(taken / GIB, 3)}
    watch.result()
    anonymous, resident = max(watch.anonymous, now[0]), max(watch.resident, now[1])
    return {
        "peak_gib": round((resident - before[1]) / GIB, 3),
        "peak_anonymous_gib": round((anonymous - before[0]) / GIB, 3),
    }


# ---- one ratio -----------------------------------------------------------------------------------------------------


def whole(job: Job, device: torch.device) -> Held:
    """Hold one ratio in one runtime."""
    if job.runtime in ENGINES:
        from ppcl_fx.export import EngineTransformer

        backend = TENSORRT if job.runtime in BUILT else job.runtime
        engine = EngineTransformer(job.folder, keep=job.keep, backend=backend, device=device)
        call = job.spec.call(job.spec.pluggable().graph, device)
        return Held({"whole": lambda: engine(**call, return_dict=False)}, {"params": engine.param_count()})
    model = job.spec.pluggable().plug(students=job.students)
    gm, params = model.graph_module(), model.param_count()
    materialise(gm, device)
    call = job.spec.call(gm, device)
    ready = torch.compile(gm) if job.runtime == COMPILE else gm
    return Held({"whole": lambda: ready(**call)}, {"params": params})


def exported(job: Job, device: torch.device) -> Held:
    """Write the files of all ratios over one copy of random weights; hold nothing."""
    from ppcl_fx.export import ExportConfig, export

    model = job.spec.pluggable()
    materialise(model.graph, torch.device("cpu"))
    keeps = tuple(ratio.keep for ratio in job.spec.ratios)
    format = job.runtime if job.runtime in BUILT else "onnx"
    export(model, job.folder, ExportConfig(keep=keeps, runs=1), format=format)
    return Held({})


# ---- one block -----------------------------------------------------------------------------------------------------


def block(job: Job, device: torch.device) -> Held:
    """Hold the middle one of three blocks of each list, with the inputs that it has in the model."""
    gm = job.spec.shallow_teacher()
    materialise(gm, device)
    call = job.spec.call(gm, device)
    paths = [stack.blocks[1].path for stack in stacks(gm)]
    if job.runtime == ONNXRUNTIME:
        return Held({_list(path): _onnx_block(job, gm, call, path, device) for path in paths})
    if job.runtime in BUILT:
        raise PpclError("no engine is built for a block alone")
    timed = cut(gm, stacks(gm), ())
    pieces = {path: timed.gm.get_submodule(f"submod_{timed.owners.index(path)}") for path in paths}
    given: dict[str, tuple[Any, ...]] = {}
    hooks = [
        piece.register_forward_pre_hook(lambda module, args, path=path: given.update({path: args}))
        for path, piece in pieces.items()
    ]
    timed.gm(**call)
    for hook in hooks:
        hook.remove()
    ready = {path: torch.compile(piece) if job.runtime == COMPILE else piece for path, piece in pieces.items()}
    return Held({_list(path): partial(ready[path], *given[path]) for path in paths})


def _list(path: str) -> str:
    return path.rpartition(".")[0]


class _Reader(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, gm: GraphModule, wanted: set[Node]) -> None:
        super().__init__(gm)
        self.wanted, self.values = wanted, dict[Node, torch.Tensor]()

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _onnx_block(
    job: Job, gm: GraphModule, call: Mapping[str, Any], path: str, device: torch.device
) -> Callable[[], Any]:
    """Export one block of a traced model, as export does it within the whole, and open it in onnxruntime."""
    from ppcl_fx.export.fusing import fuse
    from ppcl_fx.export.onnx.assemble import Shapes, stitch
    from ppcl_fx.export.onnx.graph_run import run_graph
    from ppcl_fx.export.onnx.segments import Translations, segments
    from ppcl_fx.export.onnx.writer import save
    from ppcl_fx.passes.lowering.lowering import lower

    lowered = lower(gm)
    part = max((s for s in segments(lowered.graph) if s.name == path), key=lambda s: len(s.graph.graph.nodes))
    feeds = lowered.feeds(dict(call))
    reader = _Reader(lowered.graph, {*part.inputs, *part.outputs})
    reader.run(*feeds.values())
    names = [str(node.target) for node in part.graph.graph.nodes if node.op == "placeholder"]
    inputs = {n: reader.values[node].contiguous() for n, node in zip(names, part.inputs, strict=True)}
    model = stitch(part.graph, Shapes(run_graph(part.graph, inputs)[1], {}), Translations())
    fuse(model)
    file = job.folder / f"{path}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    save(model, file, embed=True)
    outputs = [reader.values[node] for node in part.outputs]
    return _session(file, inputs, outputs, device)


def _session(
    file: Path, inputs: Mapping[str, torch.Tensor], outputs: list[torch.Tensor], device: torch.device
) -> Callable[[], Any]:
    """Open a file as the runtime opens that of a whole model, with inputs and outputs in place."""
    from ppcl_fx.export.extras import need
    from ppcl_fx.export.runtime.onnx_session import element_types
    from ppcl_fx.export.runtime.sessions import provider

    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = runtime.InferenceSession(str(file), options, providers=[provider(ONNXRUNTIME, device)])
    binding = session.io_binding()

    def place(tensor: torch.Tensor) -> tuple[Any, ...]:
        shape, index = list(tensor.shape), device.index or 0
        return device.type, index, element_types()[tensor.dtype], shape, tensor.data_ptr()

    results = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in outputs]
    for name, tensor in inputs.items():
        binding.bind_input(name, *place(tensor))
    for port, tensor in zip(session.get_outputs(), results, strict=True):
        binding.bind_output(port.name, *place(tensor))

    def run() -> list[torch.Tensor]:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return results

    run()
    for tensor, expected in zip(results, outputs, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=1e-2)
    keep = (inputs, session)  # the binding holds addresses only
    return lambda: (run(), keep)


__all__ = [
    "BLOCK", "BUILT", "COMPILE", "EAGER", "ENGINES", "ONNXRUNTIME", "RTX", "RUNTIMES", "TENSORRT", "Job", "Worker",
    "one_line",
]
