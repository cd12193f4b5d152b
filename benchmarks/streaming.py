"""Analysis and rewriting of a full-size Qwen-Image (20.43 B parameters in bf16) with one block in memory at a time.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --size 1024 --calls 2 --batch 1 --text 4096 --samples 1 --parts forward,analyze

Nothing is downloaded. The checkpoint is synthetic: one block of random weights in a file, hard-linked sixty times, and
a file with the layers outside of the blocks. So the disk holds 0.8 GB, and after the first block the weights come from
the system's page cache: what a cold disk would add is the checkpoint's size over the disk's speed. The inputs are
random too.

Each part runs in a process of its own: a plain forward pass, block by block, without watching anything; the analysis
of the same calls; the rewrite by the paper's Eq. 13. Peak memory is the largest RssAnon that /proc/self/status gave,
asked every 20 ms: memory that no file backs. Memory-mapped weights are not in it, since the system takes them back at
will; the largest RSS with them is given too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from benchmarks.clock import apart, parser, write
from benchmarks.trace import STACK
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.io.files import need_room
from ppcl_fx.io.shards import Shards, Stored
from ppcl_fx.ir.executor import Executor, Residency
from ppcl_fx.ir.spill import Spill
from ppcl_fx.model.paper_plans import named
from ppcl_fx.model.rewrite import rewrite_streamed
from ppcl_fx.passes.analysis.analyze import analyze_streamed
from ppcl_fx.passes.analysis.probes import NormalEquations
from ppcl_fx.passes.analysis.stream_sites import stream_sites
from ppcl_fx.passes.calibration.memory_estimate import state_budget
from ppcl_fx.schema.plan import DepthEdit, Plan
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import Checkpoint, skeleton

Config = dict[str, Any]
PACKAGES = ("torch", "diffusers", "safetensors", "ppcl-fx")
PARTS = ("forward", "analyze", "rewrite")
HEAD = 128
CPU = torch.device("cpu")


def config(blocks: int, heads: int) -> Config:
    """Return the configuration of Qwen-Image with `blocks` blocks (60) of `heads` heads (24) of 128 channels."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "num_layers": blocks,
        "num_attention_heads": heads,
        "attention_head_dim": HEAD,
    }


def make(folder: Path, made: Config) -> None:
    """Write the synthetic checkpoint: ``rest.safetensors``, and one block's weights under sixty names."""
    model = skeleton(QwenImageTransformer2DModel, made, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rest: dict[str, torch.Tensor] = {}
    block: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        first = name.startswith(f"{STACK}.0.")
        if first or not name.startswith(f"{STACK}."):
            (block if first else rest)[name] = _random(name, tensor, generator)
    save_file(rest, folder / "rest.safetensors")
    save_file(block, folder / _file(0))
    for number in range(1, made["num_layers"]):
        (folder / _file(number)).hardlink_to(folder / _file(0))


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations within bounds: norms of 1, small biases, products of about their inputs' size."""
    if like.ndim == 1 and name.endswith("weight"):
        return torch.ones(like.shape, dtype=torch.bfloat16)
    scale = 0.02 if like.ndim == 1 else 0.5 * like.shape[-1] ** -0.5
    return (torch.randn(like.shape, generator=generator) * scale).to(torch.bfloat16)


def _file(number: int) -> str:
    return f"block-{number:02d}.safetensors"


def opened(folder: Path, made: Config) -> Checkpoint:
    """Open the synthetic checkpoint. Every block's file names its tensors as block 0's: names are turned here."""
    model = skeleton(QwenImageTransformer2DModel, made, torch.bfloat16)
    stored = {}
    for name, tensor in model.state_dict().items():
        found = re.match(rf"{STACK}\.(\d+)\.", name)
        file = folder / (_file(int(found[1])) if found else "rest.safetensors")
        inside = re.sub(rf"^{STACK}\.\d+\.", f"{STACK}.0.", name)
        stored[name] = Stored(file, inside, torch.bfloat16, tuple(tensor.shape))
    shards = Shards(folder, stored)
    shards.check(model)
    return Checkpoint(model, shards)


def calls(count: int, batch: int, side: int, text: int) -> Calls:
    """Return random calls of `batch` samples: `side` x `side` image tokens and `text` text tokens in each."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        kwargs = {
            "hidden_states": torch.randn(batch, side * side, 64, generator=generator).bfloat16(),
            "encoder_hidden_states": torch.randn(batch, text, 3584, generator=generator).bfloat16(),
            "timestep": torch.full((batch,), (index + 0.5) / count, dtype=torch.bfloat16),
            "img_shapes": [[(1, side, side)]] * batch,
            "return_dict": False,
        }
        made.append(Call(kwargs, (f"prompt {index}",), (index + 0.5) / count, index, batch))
    return Calls(made)


def plan(blocks: int) -> Plan:
    """Return the paper's Eq. 13, or for a smaller model one interval."""
    if blocks == 60:
        return named("paper:qwen-image-12b").plan()
    return Plan(edits=[DepthEdit(stack=STACK, first=0, last=blocks - 1)])


# ---- the parts -----------------------------------------------------------------------------------------------------


def forward(checkpoint: Checkpoint, recorded: Calls, work: Path, limit: int, samples: int) -> dict[str, Any]:
    """Run every call through the model, block by block, and nothing else."""
    gm = trace(checkpoint.model, recorded.examples())
    states = Spill(work / "states", state_budget(gm, recorded, (), limit), CPU)
    residency = Residency(CPU, checkpoint.tensor, states, checkpoint.shards.close)
    executor = Executor(gm, lambda _: [], residency)
    begin = time.perf_counter()
    finite = []

    def look(call: int, result: Any) -> None:
        if result is not None:
            finite.append(bool(result[0].isfinite().all()))

    for sweep in executor.sweeps:
        executor.run(sweep, (call.kwargs for call in recorded), end=look)
    assert finite == [True] * len(recorded)
    return {"seconds": round(time.perf_counter() - begin, 1), "states_bytes": states.peak}


def analyze(checkpoint: Checkpoint, recorded: Calls, work: Path, limit: int, samples: int) -> dict[str, Any]:
    """Analyse; the time goes to the forward pass, to sums, to solving them, and to the curves at the end."""
    spent = {"sums": 0.0, "solving": 0.0}
    curves: list[float] = []

    def report(done: int, total: int, label: str = "") -> None:
        if label.startswith("curves") and not curves:
            curves.append(time.perf_counter())

    begin = time.perf_counter()
    with _timed(spent, "sums", "add"), _timed(spent, "solving", "solve"):
        found = analyze_streamed(
            checkpoint,
            recorded,
            work / "run",
            memory_limit=limit,
            samples=samples,
            report=report,
        )
    end = time.perf_counter()
    gm = trace(checkpoint.model, recorded.examples())
    return {
        "seconds": round(end - begin, 1),
        "of_which": {
            "blocks": round(curves[0] - begin, 1),
            **{name: round(seconds, 1) for name, seconds in spent.items()},
            "curves": round(end - curves[0], 1),
        },
        "solving_seconds_per_block": round(spent["solving"] / sum(len(s.blocks) for s in found.stacks), 3),
        "samples_of_curves": found.samples_used,
        "streams": len(stream_sites(gm)),
        "candidates": len(found.stacks[0].curves("image").candidates),
    }


def rewrite(checkpoint: Checkpoint, recorded: Calls, work: Path, limit: int, samples: int) -> dict[str, Any]:
    """Rewrite by Eq. 13 into a folder of teacher links and student weights."""
    begin = time.perf_counter()
    config: Any = checkpoint.model.config
    edits = plan(config["num_layers"])
    made = rewrite_streamed(checkpoint, edits, work / "student", recorded, fit=None)
    seconds = time.perf_counter() - begin
    size = (work / "student" / "students.safetensors").stat().st_size
    return {
        "seconds": round(seconds, 1),
        "edits": len(edits.edits),
        "written_bytes": size,
        "mib_per_second": round(size / 2**20 / seconds),
        "params": made.param_count(made.edits),
        "teacher_params": made.teacher_params,
        "teacher_files": "linked",
    }


@contextmanager
def _timed(spent: dict[str, float], name: str, method: str) -> Iterator[None]:
    """Add the time that a method of `NormalEquations` takes to ``spent[name]``."""
    original: Callable[..., Any] = getattr(NormalEquations, method)

    def timed(self: NormalEquations, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begin

    setattr(NormalEquations, method, timed)
    try:
        yield
    finally:
        setattr(NormalEquations, method, original)


def held() -> tuple[int, int]:
    """Return the bytes that this process holds: those that no file backs, and all."""
    found = dict(re.findall(r"^(RssAnon|VmRSS):\s+(\d+)", Path("/proc/self/status").read_text(), re.M))
    return int(found["RssAnon"]) * 1024, int(found["VmRSS"]) * 1024


class Peak(threading.Thread):
    """Watches this process's memory: the most that was anonymous, and the most in all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            anonymous, resident = held()
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)

    def result(self) -> dict[str, float]:
        """Stop watching; GiB."""
        self._done.set()
        self.join()
        return {
            "peak_anonymous_gib": round(self.anonymous / 2**30, 2),
            "peak_resident_gib": round(self.resident / 2**30, 2),
        }


# ---- putting them together -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> Path | None:
    """Measure, print and write the result; return its path."""
    options = _options(arguments)
    made = config(options.blocks, options.heads)
    if options.part:
        peak = Peak()
        peak.start()
        recorded = calls(options.calls, options.batch, options.side, options.text)
        work = Path(options.scratch)
        part = globals()[options.part](
            opened(work / "model", made), recorded, work, int(options.memory_gib * 2**30), options.samples
        )
        print(json.dumps({**part, **peak.result()}))
        return None
    scratch = Path(tempfile.mkdtemp(prefix="ppcl-streaming-", dir=options.scratch))
    try:
        need_room(scratch, 16 * 2**30 if options.heads >= 24 else 2**30)
        (scratch / "model").mkdir()
        make(scratch / "model", made)
        checkpoint = opened(scratch / "model", made)
        result: dict[str, Any] = {
            "teacher_params": sum(p.numel() for p in checkpoint.model.parameters()),
            "checkpoint": "one block file hard-linked, so the weights come from the page cache",
            **described(options),
        }
        for part in options.parts.split(","):
            names = ("blocks", "heads", "calls", "batch", "side", "text", "samples", "memory-gib")
            result[part] = apart("streaming", options, names, "--part", part, "--scratch", str(scratch))
            if {"forward", "analyze"} <= result.keys():
                ratio = result["analyze"]["seconds"] / result["forward"]["seconds"]
                result["analysis_over_forward"] = round(ratio, 2)
            # After each part: a long measurement that is cut short is not lost.
            path = write("streaming", options.out, result, PACKAGES, note=False)
            seconds, peak_gib = result[part]["seconds"], result[part]["peak_anonymous_gib"]
            print(f"{part:<8} {seconds:8.1f} s   {peak_gib:.2f} GiB", flush=True)
    finally:
        shutil.rmtree(scratch)
    if "analysis_over_forward" in result:
        print(f"analysis / forward: {result['analysis_over_forward']}   {result['analyze']['of_which']}")
    print(path)
    return path


def described(options: argparse.Namespace) -> dict[str, Any]:
    """Return the model, the calls and the limit that were asked for, for a result."""
    return {
        "model": f"Qwen-Image, {options.blocks} blocks of width {options.heads * HEAD}, bf16, random weights",
        "calls": {
            "count": options.calls,
            "batch": options.batch,
            "image_tokens": options.side**2,
            "text_tokens": options.text,
        },
        "memory_limit_gib": options.memory_gib,
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(
        "streaming",
        __doc__,
        blocks=(60, "blocks"),
        heads=(24, "heads of 128 channels"),
        calls=(4, "calls"),
        batch=(16, "samples in each call"),
        side=(16, "image tokens along one side"),
        text=(256, "text tokens"),
        samples=(2, "samples that the curves average over"),
        memory_gib=(12.0, "the limit that is kept"),
        parts=(",".join(PARTS), "what to measure"),
    )
    made.add_argument("--size", type=int, default=None, help="the side in pixels, 16 to a token: 1024 is --side 64")
    made.add_argument("--scratch", default=None, help="folder for the checkpoint (default: the system's)")
    made.add_argument("--part", choices=PARTS, default=None, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.size is not None:
        if options.size < 16 or options.size % 16:
            made.error(f"--size {options.size}: give a multiple of 16")
        options.side = options.size // 16
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
