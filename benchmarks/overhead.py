"""What a training step costs above its arithmetic, on the model that ships.

    python -m benchmarks.overhead

A step of `ppcl_fx.train` is timed from the end of the step before to the end of its own: drawing the calls, the
teacher, the students, the losses, clipping, AdamW, logs. After each step its bare twin is timed on a call of the same
size: the teacher's forward pass as far as the stage needs its states, without gradients, and the students' forward and
backward pass from those states to the loss, both as plain compiled graphs. The two are measured in turns, so that a
noisy machine treats them alike.

The plan is the paper's for half of the parameters, as in `make demo`. The ratio is the median step over the sum of the
medians of teacher and students.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, write
from benchmarks.selection import texts
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.shapes import load_pipeline
from ppcl_fx.train import train
from ppcl_fx.train.config import STAGES, Weights
from ppcl_fx.train.core.batches import Batches
from ppcl_fx.train.core.distillation_graph import distil, pairs, train_only
from ppcl_fx.train.core.distiller import inputs, live_nodes
from ppcl_fx.train.core.losses import edit_loss, output_loss
from ppcl_fx.train.core.stages import prediction

WARM = 5
"""Steps before the clock counts."""


class Distilling:
    """A stage's distillation graph in two: what needs no gradients, and what does.

    Args:
        model: the pluggable model; its students train, nothing else.
        stage: "depth" or "width".
    """

    def __init__(self, model: ppcl_fx.PluggableModel, stage: str) -> None:
        train_only(model, stage)
        gm = distil(model, stage)
        live = live_nodes(gm)
        border = [n for n in gm.graph.nodes if n not in live and any(user in live for user in n.users)]
        ends = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is pairs]
        self._whole = gm
        self._teacher = _part(gm, [n for n in gm.graph.nodes if n not in live], (), border)
        self._students = _part(gm, [n for n in gm.graph.nodes if n in live and n not in ends], border, ends)

    def teacher(self, kwargs: dict[str, Any]) -> Any:
        """Run the teacher as far as the stage needs it, and return what the students start from."""
        with torch.no_grad():
            return self._teacher(*inputs(self._whole, kwargs))

    def students(self, states: Any, kwargs: dict[str, Any]) -> None:
        """Run all students forward and backward."""
        for _, terms in self._students(*states):
            torch.autograd.backward(edit_loss(terms, Weights()))


class FineTuning:
    """The teacher's forward pass, and the forward and backward pass of the mixture that is fine-tuned.

    Args:
        model: the pluggable model.
        stage: not used; the same arguments as `Distilling`.
    """

    def __init__(self, model: ppcl_fx.PluggableModel, stage: str) -> None:
        self._teacher = mixture(model, ())
        self._student = mixture(model, model.plan.ids).requires_grad_(True)

    def teacher(self, kwargs: dict[str, Any]) -> Any:
        """Return the teacher's velocity."""
        with torch.no_grad():
            return prediction(self._teacher(*inputs(self._teacher, kwargs)))

    def students(self, states: Any, kwargs: dict[str, Any]) -> None:
        """Run the mixture forward and backward."""
        torch.autograd.backward(output_loss(prediction(self._student(*inputs(self._student, kwargs))), states))


def _part(gm: GraphModule, nodes: Sequence[Node], given: Sequence[Node], wanted: Sequence[Node]) -> GraphModule:
    """Return a graph module of some nodes of `gm`; of a wanted `pairs` node it returns the arguments."""
    graph, values = Graph(tracer_cls=None), {}
    for node in given:
        values[node] = graph.placeholder(node.name)
    for node in nodes:
        if node.op != "output":
            values[node] = graph.node_copy(node, lambda source: values[source])
    found = [
        torch.fx.map_arg(n.args, lambda source: values[source]) if n.target is pairs else values[n] for n in wanted
    ]
    graph.output(found)
    return GraphModule(gm, graph)


def clear(model: ppcl_fx.PluggableModel) -> None:
    """Forget all gradients: the twin's must not be added to."""
    for parameter in model.parameters():
        parameter.grad = None


def prepare(calls: ppcl_fx.Calls) -> ppcl_fx.PluggableModel:
    """Return a pluggable model of its own: the shipped model, and the paper's plan for half of its parameters."""
    gm = ppcl_fx.trace(load_pipeline().transformer, calls.examples())
    plan = ppcl_fx.select(ppcl_fx.analyze(gm, calls[:8]), config=RewriteConfig(keep=0.5, select="paper"))
    return ppcl_fx.rewrite(gm, plan, calls[:8])


def measure(stage: str, calls: ppcl_fx.Calls, steps: int, batch: int) -> dict[str, Any]:
    """Time `steps` steps of a stage, each with its bare twin after it, on weights of its own; return the medians."""
    model, other = prepare(calls), prepare(calls)
    twin = (FineTuning if stage == "finetune" else Distilling)(other, stage)
    feed = Batches(calls, batch, 1)
    seconds: dict[str, list[float]] = {"step": [], "teacher": [], "students": []}
    began = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal began
        seconds["step"].append(time.perf_counter() - began)
        kwargs = feed.kwargs(len(seconds["teacher"]))
        for parameter in other.parameters():
            parameter.grad = None
        at = [time.perf_counter()]
        states = twin.teacher(kwargs)
        at.append(time.perf_counter())
        twin.students(states, kwargs)
        at.append(time.perf_counter())
        seconds["teacher"].append(at[1] - at[0])
        seconds["students"].append(at[2] - at[1])
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as place:
        train(
            model, calls, stages=[stage], steps=[steps + WARM + 1], out=Path(place) / "run", batch=batch,
            every=steps + WARM + 2, recorded="never", progress=after,
        )  # fmt: skip
    # The last step writes the stage's checkpoint before it is told of; the first ones pay for the start.
    median = {name: statistics.median(values[WARM:-1]) for name, values in seconds.items()}
    bare = median["teacher"] + median["students"]
    return {name: round(value, 5) for name, value in median.items()} | {"ratio": round(median["step"] / bare, 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    made = parser(
        "overhead",
        __doc__,
        steps=(100, "measured steps of each stage"),
        samples=(16, "samples of a call"),
        batch=(1, "calls of a step"),
    )
    options = made.parse_args(arguments)
    pipeline = shapes_pipeline()
    calls = ppcl_fx.record(pipeline, texts()[: 4 * options.samples], batch_size=options.samples, seed=0)
    stages = {stage: measure(stage, calls, options.steps, options.batch) for stage in STAGES}
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "samples": options.samples * options.batch}
    result |= {"steps": options.steps, "stages": stages}
    for stage, found in stages.items():
        alone = found["teacher"] + found["students"]
        print(f"{stage}: {found['step'] * 1000:.1f} ms a step, {alone * 1000:.1f} ms alone, ratio {found['ratio']}")
    write("overhead", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
