"""Analysis: from a traced model, or from weights on disk, and recorded calls to a `Redundancy`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import need_room
from ppcl_fx.ir.executor import Residency
from ppcl_fx.ir.graphs import descendants
from ppcl_fx.ir.meta import graph_info, node_info
from ppcl_fx.ir.sites import ffn_sites
from ppcl_fx.ir.spill import Spill
from ppcl_fx.ir.stacks import Stack, stacks
from ppcl_fx.passes.analysis.annotate import FfnFits, LinearProbes, Similarity, TextSimilarity
from ppcl_fx.passes.analysis.intervals import CandidateIntervals, algorithm_1, shifted
from ppcl_fx.passes.analysis.stream_sites import StreamSite, stream_sites
from ppcl_fx.passes.calibration.calibration import (
    Calibration,
    Notify,
    Progress,
    calibrate,
    check_request,
    silent,
)
from ppcl_fx.passes.calibration.memory_estimate import state_budget
from ppcl_fx.passes.calibration.run_store import MEMORY, Identity, RunStore
from ppcl_fx.passes.contract import Pipeline
from ppcl_fx.passes.options import AnalyzeConfig
from ppcl_fx.passes.selection.savings import block_parameters, block_savings, parameters
from ppcl_fx.schema.analysis import BlockSavings, Redundancy, StackAnalysis, StreamCurves
from ppcl_fx.tracing import trace

if TYPE_CHECKING:
    from ppcl_fx.calls.store import Calls
    from ppcl_fx.tracing.meta_model import Checkpoint

OTHER = "the calls were recorded from another model; record calls of this one"
_log = logging.getLogger("ppcl_fx")


def analyze(
    gm: GraphModule,
    calls: Calls,
    config: AnalyzeConfig | None = None,
    *,
    progress: Progress | None = None,
    memory: int = MEMORY,
    **options: Any,
) -> Redundancy:
    """Find what is redundant in a diffusion transformer (Sec. 3.2 and appendix 6 of the paper).

    The teacher runs once on each call; from that run come probes, CKA curves, candidate intervals, text-stream
    similarity and feed-forward fits. What is found is also on the nodes, in ``node.meta["ppcl"]``.

    Args:
        gm: the traced teacher.
        calls: recorded calls of it.
        config: the options; those of recording and of working block by block are the command's.
        progress: called after each call with the number done and the number of all.
        memory: bytes of activations kept for CKA.
        **options: fields of `AnalyzeConfig` by name, over those of `config`.

    Raises:
        PpclError: an option is unknown or makes no sense; no stack of blocks, no such stream, no calls or too few (half
            a token a channel), or NaN in calls or weights.
    """
    config = AnalyzeConfig.merged(config, options)
    check_stream(stream_sites(gm), config.stream)
    traced = graph_info(gm).get("model")
    if traced and calls.model and traced != calls.model:
        raise PpclError(OTHER)
    return conclude(calibrate(gm, calls, config, memory, progress), calls, config.stream)


def analyze_streamed(
    checkpoint: Checkpoint,
    calls: Calls,
    work: Path,
    config: AnalyzeConfig | None = None,
    *,
    memory: int = MEMORY,
    report: Notify = silent,
    **options: Any,
) -> Redundancy:
    """Do what `analyze` does with the weights left on disk: all calls go through one block, then the next.

    Probes, kept activations and results go to `work`; a run that was killed goes on from there, with the same result.
    `work` is removed at the end; a caller that writes the result down first takes `calibration_on_disk` and `conclude`.

    The other arguments are those of `analyze`. ``memory_limit`` is in bytes that this process may hold (memory-mapped
    weights, which the system takes back when it needs to, do not count); what does not fit goes to `work`.

    Raises:
        PpclError: as `analyze`; and the limit or the disk is too small, or `work` holds something else.
    """
    config = AnalyzeConfig.merged(config, options)
    found = conclude(calibration_on_disk(checkpoint, calls, work, config, memory, report).run(), calls, config.stream)
    owned.discard(work, owned.ANALYSING)
    return found


def calibration_on_disk(
    checkpoint: Checkpoint, calls: Calls, work: Path, config: AnalyzeConfig, memory: int, report: Notify
) -> Calibration:
    """Return the calibration of `analyze_streamed`, whose arguments these are, ready to run or to go on."""
    check_request(calls)
    owned.check_replaceable(work, owned.ANALYSING)
    if calls.model and calls.model != checkpoint.fingerprint:
        raise PpclError(OTHER)
    gm = trace(checkpoint.model, calls.examples())
    graph_info(gm)["model"] = checkpoint.fingerprint
    sites = stream_sites(gm)
    check_stream(sites, config.stream)
    budget = 2**62 if config.memory_limit is None else state_budget(gm, calls, sites, config.memory_limit)
    states = [(len(site.outputs), site.outputs[0].meta["val"]) for site in sites]
    # Probes, and the activations of at least one sample.
    need_room(work, sum(n * int(v.shape[-1]) ** 2 * 4 + min(memory, (n + 1) * v[0].nbytes) for n, v in states))
    identity = Identity(
        samples=config.samples,
        memory=memory,
        ridge=config.ridge,
        refine_steps=config.refine_steps,
        model=checkpoint.fingerprint,
        calls=calls.fingerprint,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
    )
    device = torch.device(config.device)
    residency = Residency(device, checkpoint.tensor, Spill(work / "states", budget, device), checkpoint.shards.close)
    return Calibration(gm, calls, config, memory, residency, RunStore(work, identity), report)


def conclude(calibration: Calibration, calls: Calls, stream: str) -> Redundancy:
    """Run all analysis passes over one calibration; raises `PpclError` where a curve cannot be computed from it."""
    gm = calibration.gm
    few = [words for words in map(calibration.few, calibration.streams) if words]
    for words in few:
        _log.warning("%s", words)
    probes, curves = LinearProbes(calibration), Similarity(calibration)
    with torch.no_grad():
        Pipeline([probes, curves, CandidateIntervals(), TextSimilarity(calibration), FfnFits(calibration)])(gm)
    found = stacks(gm)
    savings = block_savings(gm, found)
    return Redundancy(
        model=calls.model,
        calls=calls.fingerprint,
        teacher_params=parameters(gm),
        calls_used=calibration.calls_used,
        samples_used=calibration.samples_used,
        held_out=calibration.held_out,
        few=few,
        stream=stream,
        stacks=[_stack_analysis(gm, stack, calibration.streams, savings[stack.name]) for stack in found],
    )


def check_stream(sites: Sequence[StreamSite], stream: str) -> None:
    """Raise `PpclError` where a stack has several streams and none is called `stream`."""
    for stack in dict.fromkeys(site.stack.name for site in sites):
        names = [site.stream for site in sites if site.stack.name == stack]
        if len(names) > 1 and stream not in names:
            raise PpclError(
                f"stack {stack} has no stream {stream!r}{near(stream, names)}; its streams are {', '.join(names)}"
            )


def _stack_analysis(
    gm: GraphModule, stack: Stack, sites: Sequence[StreamSite], savings: list[BlockSavings]
) -> StackAnalysis:
    """Gather what the passes left on one stack's nodes."""
    own = [site for site in sites if site.stack.name == stack.name]
    text = next((site for site in own if site.stream == "text"), None)
    return StackAnalysis(
        name=stack.name,
        path=stack.blocks[0].stack,
        first=stack.blocks[0].index,
        blocks=[block.path for block in stack.blocks],
        block_params=[block_parameters(gm, block) for block in stack.blocks],
        streams={site.stream: _stream_curves(site) for site in own},
        text_similarity=[node_info(n)["text_similarity"] for n in text.outputs] if text else [None] * len(stack.blocks),
        ffn=[node_info(site.after)["ffn"] for block in stack.blocks for site in ffn_sites(gm, block)],
        savings=savings,
    )


def _stream_curves(site: StreamSite) -> StreamCurves:
    found: list[Any] = [node_info(node) for node in site.outputs]
    columns = {name: [meta[name] for meta in found] for name in ("fit", "cka", "delta", "gap", "similarity")}
    whole = found[-1]["energy"]
    return StreamCurves(
        **columns,
        energy=[meta["energy"] / whole if whole else 1.0 for meta in found],
        candidates=shifted(algorithm_1(columns["delta"]), site.stack.blocks[0].index),
        live=site.outputs[-1].graph.output_node() in descendants([site.outputs[-1]]),
    )
