"""Analysis of the shipped model, beside the same statistics computed the obvious way, in one run.

    python -m benchmarks.analysis

The calls are those that the demo analyses. Analysis is `ppcl_fx.analyze`, whole: the teacher's run, probes, curves,
text streams, feed-forwards, savings. The obvious way is only what the paper's text says of probes and Eq. 3: run the
teacher and keep the states of its blocks; train the probe of each block by gradient steps on Eq. 2 (AdamW, one call of
16 samples a step, as many samples as the paper's 8 GPUs take); then for every start u and every end k start again from
the teacher's state after block u, apply the probes of u + 1 to k one after the other, and compute CKA with the
teacher's state from centred Gram matrices. Both use the same calls, and the curves average over the same samples.

Trained probes start at zero, not at the solution of Eq. 1, so that the curves are found in two independent ways; the
result says how far apart they are. To show that the two mean the same numbers, the obvious curves are also computed
with the solved probes (outside of the clock).

There are two ratios. The first lets the obvious way keep all states of all blocks in memory, as a small model allows.
The second is for a training set too large for that, as the paper's: each gradient step runs the teacher on its call,
once for the probes of all blocks. It is extrapolated from the measured run of the teacher, one step for each call.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, timed, write
from benchmarks.trace import STACK
from ppcl_fx.calls.store import Calls
from ppcl_fx.demo import SEED, DemoSettings
from ppcl_fx.passes.calibration.calibration import calibrate
from ppcl_fx.passes.calibration.reservoir import ranks
from ppcl_fx.passes.options import AnalyzeConfig
from ppcl_fx.schema.analysis import Matrix, Redundancy
from ppcl_fx.shapes.captions import CATEGORIES, every_prompt

STREAMS = {"text": "encoder_hidden_states", "image": "hidden_states"}
"""Streams in the order in which a block returns them -> the argument by which a block takes them."""
LEARNING_RATE = 1e-2

States = dict[str, list[list[Tensor]]]
"""Stream -> before the stack and after each block -> for each call ``[batch, tokens, channels]``."""


def record(calls: int) -> tuple[nn.Module, Calls]:
    """Return the shipped transformer and the calls of it that the demo would analyse, `calls` of them."""
    settings = DemoSettings(out=Path())
    pipeline = shapes_pipeline()
    texts = [prompt.text for category in CATEGORIES for prompt in every_prompt(category)] * settings.recorded
    random.Random(SEED).shuffle(texts)
    recorded = ppcl_fx.record(pipeline, texts, batch_size=settings.batch, seed=SEED)
    return pipeline.transformer, recorded[:: max(1, len(recorded) // calls)]


# ---- the obvious way -------------------------------------------------------------------------------------------------


def run_teacher(model: nn.Module, calls: Calls) -> States:
    """Run the teacher on each call and keep the states before its first block and after each block."""
    blocks = list(model.get_submodule(STACK).children())
    states: States = {stream: [[] for _ in range(len(blocks) + 1)] for stream in STREAMS}

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        for stream, argument in STREAMS.items():
            states[stream][0].append(kwargs[argument])

    with torch.no_grad(), _hooked(blocks, states):
        handle = blocks[0].register_forward_pre_hook(entering, with_kwargs=True)
        for call in calls:
            model(**call.kwargs)
        handle.remove()
    return states


@contextmanager
def _hooked(blocks: Sequence[nn.Module], states: States) -> Iterator[None]:
    def leaving(position: int) -> Any:
        def keep(_: nn.Module, __: Any, outputs: tuple[Tensor, ...]) -> None:
            for stream, output in zip(STREAMS, outputs, strict=True):
                states[stream][position].append(output)

        return keep

    handles = [block.register_forward_hook(leaving(i + 1)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_probe(before: Sequence[Tensor], after: Sequence[Tensor], steps: int, rate: float) -> Tensor:
    """Return W of ``x -> x + x W^T`` after `steps` AdamW steps on Eq. 2, one call a step; the rate falls to zero."""
    width = before[0].shape[-1]
    weight = nn.Parameter(torch.zeros(width, width))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        x, y = before[step % len(before)], after[step % len(before)]
        loss = (nn.functional.linear(x, weight) + x - y).square().sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach()


def fit(before: Sequence[Tensor], after: Sequence[Tensor], weight: Tensor) -> float:
    """Return Eq. 2 of one block over all calls, relative to the block's own change; 0 where it changes nothing."""
    missed = sum(
        float((nn.functional.linear(x, weight) + x - y).double().square().sum())
        for x, y in zip(before, after, strict=True)
    )
    changed = sum(float((y - x).double().square().sum()) for x, y in zip(before, after, strict=True))
    return missed / changed if changed else 0.0


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Return linear CKA of each sample: ``HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M))`` with centred Gram matrices."""
    k, m = (_centred_gram(state) for state in (x, y))
    return _hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt()


def _centred_gram(x: Tensor) -> Tensor:
    gram = x @ x.mT
    rows, columns, whole = (gram.mean(dim=dim, keepdim=True) for dim in (1, 2, (1, 2)))
    return gram - rows - columns + whole


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    return (k * m).sum(dim=(1, 2))


def curves(states: Sequence[Tensor], probes: Sequence[Tensor]) -> Matrix:
    """Return ``cka(u, k)`` for every u and k > u, each pair from scratch (Eq. 3).

    Args:
        states: the samples' states after each block, ``[samples, tokens, channels]``.
        probes: the weight of each block's probe.
    """
    found: Matrix = [[None] * len(probes) for _ in probes]
    with torch.no_grad():
        for u in range(len(probes)):
            for k in range(u + 1, len(probes)):
                x = states[u]
                for probe in probes[u + 1 : k + 1]:
                    x = x + nn.functional.linear(x, probe)
                found[u][k] = float(cka(states[u], x).nanmean())
    return found


def chosen(calls: Calls) -> list[tuple[int, int]]:
    """Return call and row of the samples that analysis averages its curves over."""
    every = [(rank, i, row) for i, call in enumerate(calls) for row, rank in enumerate(ranks(i, call.batch))]
    return sorted((i, row) for _, i, row in sorted(every)[: AnalyzeConfig().samples])


def gathered(states: Sequence[Sequence[Tensor]], samples: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the states of the samples after each block, ``[samples, tokens, channels]``."""
    return [torch.stack([after[i][row] for i, row in samples]) for after in states[1:]]


# ---- the two beside each other ---------------------------------------------------------------------------------------


def measure_both(calls: int, steps: int, rate: float, repeats: int) -> dict[str, Any]:
    """Return the seconds of both ways, their ratio, and how far apart what they find is."""
    model, some = record(calls)
    gm = ppcl_fx.trace(model, some.examples())
    ppcl_fx.analyze(gm, some[:4])  # imports and first-call costs count for nobody
    train_probe([torch.randn(2, 3, 4)], [torch.randn(2, 3, 4)], steps=2, rate=rate)
    analyses: list[Redundancy] = []
    result: dict[str, Any] = {
        "model": "shapes, as it ships",
        "calls": len(some),
        "samples": sum(call.batch for call in some),
        "samples_of_the_curves": len(chosen(some)),
        "blocks": len(list(model.get_submodule(STACK).children())),
        "analysis": timed(lambda: analyses.append(ppcl_fx.analyze(gm, some)), repeats),
    }
    clock = {"run_teacher": time.perf_counter()}
    states = run_teacher(model, some)
    clock["train_probes"] = time.perf_counter()
    probes = {
        stream: [train_probe(before, after, steps, rate) for before, after in itertools.pairwise(at)]
        for stream, at in states.items()
    }
    clock["curves"] = time.perf_counter()
    kept = {stream: gathered(at, chosen(some)) for stream, at in states.items()}
    found = {stream: curves(kept[stream], probes[stream]) for stream in STREAMS}
    ends = [*clock.values(), time.perf_counter()]
    seconds = {name: round(end - begin, 2) for (name, begin), end in zip(clock.items(), ends[1:], strict=True)}
    result["obvious"] = {
        "seconds": round(ends[-1] - ends[0], 2),
        "of_which": seconds,
        "probes": sum(map(len, probes.values())),
        "steps_a_probe": steps,
        "learning_rate": rate,
        "pairs": sum(value is not None for rows in found.values() for row in rows for value in row),
    }
    result["obvious_with_a_teacher_run_a_step"] = without_states(result["obvious"], len(some), steps)
    for name in ("obvious", "obvious_with_a_teacher_run_a_step"):
        result[name]["over_analysis"] = round(result[name]["seconds"] / result["analysis"]["median"], 2)
    solved = solved_probes(gm, some)
    result["trained_probes_apart_from_solved"] = {
        stream: apart(analyses[-1], stream, found[stream])
        | {
            "mean_fit_trained": _mean_fit(states[stream], probes[stream]),
            "mean_fit_solved": _mean_fit(states[stream], solved[stream]),
        }
        for stream in STREAMS
    }
    result["obvious_curves_of_solved_probes_apart"] = {
        stream: apart(analyses[-1], stream, curves(kept[stream], solved[stream])) for stream in STREAMS
    }
    return result


def without_states(obvious: dict[str, Any], calls: int, steps: int) -> dict[str, Any]:
    """Return the seconds of the obvious way if no states were kept for training: each step runs the teacher once."""
    seconds = dict(obvious["of_which"])
    seconds["run_teacher"] = round(seconds["run_teacher"] * max(1.0, steps / calls), 2)
    return {
        "extrapolated": f"the teacher's run on {calls} calls stands for {calls} of {steps} steps; all else is measured",
        "seconds": round(sum(seconds.values()), 2),
        "of_which": seconds,
    }


def solved_probes(gm: GraphModule, calls: Calls) -> dict[str, list[Tensor]]:
    """Return the weights of the probes that analysis solves."""
    found = calibrate(gm, calls)
    return {site.stream: [probe.weight for probe in found.probes(site)] for site in found.streams}


def apart(analysis: Redundancy, stream: str, found: Matrix) -> dict[str, float]:
    """Return the largest and the mean absolute difference of ``cka(u, k)``, over all k > u."""
    known = analysis.stack(STACK).streams[stream].cka
    differences = [
        abs(a - b)
        for one, two in zip(known, found, strict=True)
        for a, b in zip(one, two, strict=True)
        if a is not None and b is not None
    ]
    return {"largest": float(f"{max(differences):.2e}"), "mean": float(f"{_mean(differences):.2e}")}


def _mean_fit(at: Sequence[Sequence[Tensor]], probes: Sequence[Tensor]) -> float:
    return _mean(fit(*pair, probe) for pair, probe in zip(itertools.pairwise(at), probes, strict=True))


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 9)


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    made = parser(
        "analysis",
        __doc__,
        calls=(DemoSettings(out=Path()).analysed, "analysed calls, about"),
        steps=(2000, "gradient steps a probe"),
        lr=(LEARNING_RATE, "of the steps"),
        repeats=(3, "of the analysis"),
    )
    options = made.parse_args(arguments)
    result = {
        "threads": torch.get_num_threads(),
        **measure_both(options.calls, options.steps, options.lr, options.repeats),
    }
    print(f"analysis    {result['analysis']['median']:8.2f} s   ({result['calls']} calls)")
    for name in ("obvious", "obvious_with_a_teacher_run_a_step"):
        found = result[name]
        print(f"{name}: {found['seconds']:.2f} s, {found['over_analysis']} x as long   {found['of_which']}")
    for name in ("trained_probes_apart_from_solved", "obvious_curves_of_solved_probes_apart"):
        print(f"{name}: {result[name]}")
    return write("analysis", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
