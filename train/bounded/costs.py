"""What a stage costs, from shapes alone, and how fast this machine is, measured in under a second."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode

from ppcl_fx.ir.graphs import attribute
from ppcl_fx.ir.partition import Segment
from ppcl_fx.passes.calibration.memory_estimate import INSIDE, block_bytes, segment_weights, value_bytes
from ppcl_fx.train.bounded.problems import Problem
from ppcl_fx.train.core.distiller import in_one_piece, live_nodes
from ppcl_fx.train.core.optimizer import EIGHT_BIT_FROM

_log = logging.getLogger("ppcl_fx.train")

SIDE = 768
"""Rows of the matrices that are multiplied to see how fast the machine is."""
PIECE = 16 * 2**20
"""Bytes that are written to see how fast its disk is."""
SHARE = 0.5
"""What a model reaches of the speed of a bare matrix product."""


@dataclass(frozen=True)
class Speeds:
    """How fast the machine is: floating-point operations and bytes of its disk a second."""

    flops: float
    read: float
    write: float


@dataclass(frozen=True)
class ProblemCost:
    """What one problem costs; a call is one of the traced size."""

    held: int  # bytes while it trains, whatever the call: weights, gradients, masters, AdamW's moments, the average
    saved: int  # bytes of a checkpoint of it
    weights: int  # bytes of the tensors that it trains
    step: int  # bytes that a step takes on top, for a call
    flops: int  # of a forward and a backward pass on a call
    border: Mapping[str, int]  # bytes by name of the values that it needs of the teacher, for a call
    last: int  # the teacher's last segment that it needs a value of


@dataclass(frozen=True)
class TeacherCost:
    """What the teacher's streamed pass costs; a call is one of the traced size."""

    flops: tuple[int, ...]  # of each segment, for a call
    weights: tuple[int, ...]  # bytes of each segment's weights, read once in a pass
    states: tuple[int, ...]  # bytes of a call between two segments, after each segment
    block: int  # bytes that the heaviest segment takes while it runs the largest call


def problem_cost(problem: Problem, last: int, checkpointing: bool, optimizer: str, average: bool) -> ProblemCost:
    """Return what a problem costs, with gradient checkpointing, of an optimiser, and with an average of its weights.

    To evaluate the average the weights are put aside, which takes the place of the gradients. `last` is the teacher's
    last segment that the problem needs a value of.
    """
    gm = problem.graph
    trained = [gm.get_parameter(name) for name in problem.trained]
    frozen = sum(value_bytes(attribute(gm, name)) for name in problem.frozen)
    size = sum(p.nbytes for p in trained)
    low = sum(p.numel() * 4 for p in trained if p.itemsize < 4)  # float32 masters of 16-bit weights
    moments = sum(moment_bytes(p.numel(), optimizer) for p in trained)
    moments += sum(p.numel() * 4 for p in trained) if average else 0
    placeholders = gm.graph.find_nodes(op="placeholder")
    border = {name: _bytes(node) for name, node in zip(problem.border, placeholders, strict=True)}
    return ProblemCost(
        held=2 * size + 2 * low + moments + frozen,
        saved=size + low + moments,
        weights=size,
        step=_step_bytes(gm, checkpointing) + sum(border.values()),
        # A backward pass takes twice the forward pass: once for the inputs' gradients, once for the weights'.
        flops=3 * _flops(gm, gm.graph.nodes, {}),
        border=border,
        last=last,
    )


def moment_bytes(values: int, optimizer: str) -> int:
    """Return what AdamW keeps of a parameter of so many values: two float32 moments, or two of a byte."""
    if optimizer == "adamw" or values < EIGHT_BIT_FROM:
        return 8 * values
    # Besides, two float32 scales for 256 values each, and two maps from a byte to a value.
    return 2 * values + 2 * 4 * -(-values // 256) + 2 * 4 * 256


def teacher_cost(
    gm: GraphModule, segments: Sequence[Segment], skip: Callable[[Node], bool], scale: float
) -> TeacherCost:
    """Return what a pass of the teacher over some segments costs, without the nodes that are not run.

    `scale` is the size of the largest call over that of the traced one.
    """
    known: dict[tuple[Any, ...], int] = {}
    return TeacherCost(
        tuple(_flops(gm, segment.nodes, known) for segment in segments),
        tuple(segment_weights(gm, segment) for segment in segments),
        tuple(sum(_bytes(node) for node in segment.leaving) for segment in segments),
        block_bytes(gm, scale, skip),
    )


def _step_bytes(gm: GraphModule, checkpointing: bool) -> int:
    """Estimate what a step keeps for its backward pass: the trained nodes' values, and what modules hold inside."""
    kept = largest = 0
    for node in live_nodes(gm):
        size = _bytes(node)
        whole = node.op == "call_module" and not in_one_piece(gm.get_submodule(str(node.target)))
        kept += INSIDE * size if whole else size
        largest = max(largest, size)
    # Checkpointed, a module is computed again in the backward pass and holds its inside for that time.
    return INSIDE * largest + (kept if not checkpointing else kept // 2)


def _bytes(node: Node) -> int:
    return value_bytes(node.meta.get("val"))


def _flops(gm: GraphModule, nodes: Iterable[Node], known: dict[tuple[Any, ...], int]) -> int:
    """Return the FLOPs of some nodes; modules of one kind on equal shapes are counted once, and then `known`."""
    total = 0
    for node in nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        shapes = [tuple(p.shape) for p in module.parameters()] if module is not None else []
        if module is None or not shapes:
            continue
        values = [source.meta.get("val") for source in node.all_input_nodes]
        inputs = [tuple(value.shape) if isinstance(value, Tensor) else str(value) for value in values]
        key = (type(module), str(shapes), str(inputs))
        if key not in known:
            known[key] = _module_flops(module, node)
        total += known[key]
    return total


def _module_flops(module: torch.nn.Module, node: Node) -> int:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            module(*args, **kwargs)
        return int(flops.get_total_flops())
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        _log.debug("%s: its FLOPs are taken from a formula (%s)", node.target, error)
        value = node.meta.get("val")
        rows = value.numel() // value.shape[-1] if isinstance(value, Tensor) and value.ndim else 1
        return 2 * rows * sum(p.numel() for p in module.parameters())


def measure_speeds(folder: Path, dtype: torch.dtype, device: torch.device) -> Speeds:
    """Return the machine's speeds: of matrix products in a dtype on a device, and of the disk that a folder is on.

    A file that was just written is read from the system's memory, so reading is taken to be as fast as writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        piece, begin = os.urandom(PIECE), time.perf_counter()
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        disk = PIECE / (time.perf_counter() - begin)
    one = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    (one @ one).sum().item()  # a first product sets things up
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 0.1:
        (one @ one).sum().item()
        count += 1
    flops = 2 * SIDE**3 * count / (time.perf_counter() - begin)
    return Speeds(flops=SHARE * flops, read=disk, write=disk)
