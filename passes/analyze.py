"""All analysis passes over one measurement: from a traced model and recorded calls to a `Redundancy`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from ppcl_fx.errors import PpclError, near
from ppcl_fx.graphs import descendants
from ppcl_fx.passes import contract
from ppcl_fx.passes.ffn_fit import RIDGE as FFN_RIDGE
from ppcl_fx.passes.ffn_fit import FfnFits
from ppcl_fx.passes.intervals import CandidateIntervals, algorithm_1, shifted
from ppcl_fx.passes.measure import MEMORY, SAMPLES, Measurement, Progress, StreamSite, measure, stream_sites
from ppcl_fx.passes.probes import LinearProbes
from ppcl_fx.passes.savings import block_parameters, block_savings, parameters
from ppcl_fx.passes.similarity import Similarity
from ppcl_fx.passes.text_similarity import TextSimilarity
from ppcl_fx.redundancy import BlockSavings, Redundancy, StackAnalysis, StreamCurves
from ppcl_fx.sites import ffn_sites
from ppcl_fx.stacks import Stack, stacks

if TYPE_CHECKING:
    from ppcl_fx.calls import Calls

_log = logging.getLogger("ppcl_fx")


def analyze(
    gm: GraphModule,
    calls: Calls,
    *,
    ridge: float = 1e-6,
    refine_steps: int = 0,
    stream: str = "image",
    progress: Progress | None = None,
    max_samples: int = SAMPLES,
    memory: int = MEMORY,
) -> Redundancy:
    """Find what is redundant in a diffusion transformer (Sec. 3.2 and appendix 6 of the paper).

    The teacher runs once on each call; from that run come probes, CKA curves, candidate intervals,
    text-stream similarity and feed-forward fits. What is found is also on the nodes, in
    ``node.meta["ppcl"]``.

    Args:
        gm: the traced teacher.
        calls: recorded calls of it.
        ridge: of the probes' normal equations, relative to the mean squared channel.
        refine_steps: gradient steps on Eq. 2 after the closed form of Eq. 1.
        stream: the stream that intervals are decided on, where a stack has several.
        progress: called after each call with the number done and the number of all.
        max_samples: sample-timesteps that CKA averages over.
        memory: bytes of activations kept for CKA.

    Raises:
        PpclError: no stack of blocks, no such stream, no calls or too few (half a token a channel), or NaN in
            calls or weights.
    """
    check_stream(gm, stream)
    traced = gm.meta.get("ppcl", {}).get("model")
    if traced and calls.model and traced != calls.model:
        raise PpclError("the calls were recorded from another model; record calls of this one")
    measured = measure(gm, calls, max_samples=max_samples, memory=memory, progress=progress)
    return conclude(measured, calls, ridge=ridge, refine_steps=refine_steps, stream=stream)


def conclude(
    measured: Measurement, calls: Calls, *, ridge: float, refine_steps: int, stream: str
) -> Redundancy:
    """Run all analysis passes over one measurement; the arguments are those of `analyze`.

    Raises:
        PpclError: a probe or a curve cannot be computed from the measurement.
    """
    gm = measured.gm
    few = [words for words in map(measured.few, measured.streams) if words]
    for words in few:
        _log.warning("%s", words)
    with torch.no_grad():
        passes = [
            LinearProbes(measured, ridge, refine_steps),
            Similarity(measured, ridge, refine_steps),
            CandidateIntervals(),
            TextSimilarity(measured),
            FfnFits(measured, FFN_RIDGE),
        ]
        contract.run(passes, gm)
    found = stacks(gm)
    savings = block_savings(gm, found)
    return Redundancy(
        model=calls.model,
        calls=calls.fingerprint,
        teacher_params=parameters(gm),
        calls_used=measured.calls_used,
        samples_used=measured.samples_used,
        held_out=measured.held_out,
        few=few,
        stream=stream,
        stacks=[_stack_analysis(gm, stack, measured.streams, savings[stack.name]) for stack in found],
    )


def check_stream(gm: GraphModule, stream: str) -> None:
    """Raise `PpclError` where a stack has several streams and none is called `stream`."""
    _check_stream(stream_sites(gm), stream)


def _check_stream(sites: Sequence[StreamSite], stream: str) -> None:
    by_stack: dict[str, list[str]] = {}
    for site in sites:
        by_stack.setdefault(site.stack.name, []).append(site.stream)
    for stack, names in by_stack.items():
        if len(names) > 1 and stream not in names:
            raise PpclError(
                f"stack {stack} has no stream {stream!r}{near(stream, names)}; "
                f"its streams are {', '.join(names)}"
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
        text_similarity=(
            [node.meta["ppcl"]["text_similarity"] for node in text.outputs]
            if text
            else [None] * len(stack.blocks)
        ),
        ffn=[site.after.meta["ppcl"]["ffn"] for block in stack.blocks for site in ffn_sites(gm, block)],
        savings=savings,
    )


def _stream_curves(site: StreamSite) -> StreamCurves:
    found = [node.meta["ppcl"] for node in site.outputs]
    delta = [meta["delta"] for meta in found]
    whole = found[-1]["energy"]
    return StreamCurves(
        fit=[meta["fit"] for meta in found],
        cka=[meta["cka"] for meta in found],
        delta=delta,
        gap=[meta["gap"] for meta in found],
        similarity=[meta["similarity"] for meta in found],
        energy=[meta["energy"] / whole if whole else 1.0 for meta in found],
        candidates=shifted(algorithm_1(delta), site.stack.blocks[0].index),
        live=site.outputs[-1].graph.output_node() in descendants([site.outputs[-1]]),
    )
