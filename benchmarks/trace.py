"""Tracing and rewriting the full-size Qwen-Image on the meta device, beside torch.export in the same run.

    python -m benchmarks.trace

Nothing is downloaded and no weight is stored: the 20.43 B parameters have shapes only. A two-block model goes through
everything once before the clock starts, so that imports and first-call costs count for nobody.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

import ppcl_fx
from benchmarks.clock import parser, timed, write
from ppcl_fx.model.paper_plans import named
from ppcl_fx.schema.plan import DepthEdit, Plan

STACK = "transformer_blocks"
PLANS = {"rewrite_eq_13": "paper:qwen-image-12b", "rewrite_paper_plan": "paper:qwen-image-10b"}


def model(blocks: int) -> QwenImageTransformer2DModel:
    """Return Qwen-Image's transformer with `blocks` blocks (60 in the released model), on the meta device."""
    with torch.device("meta"):
        return QwenImageTransformer2DModel(num_layers=blocks).eval()


def inputs(side: int = 64, text: int = 128) -> dict[str, Any]:
    """Return one call's arguments: `side` x `side` image tokens (64: a 1024 x 1024 picture), `text` text tokens."""
    return {
        "hidden_states": torch.empty(1, side * side, 64, device="meta"),
        "encoder_hidden_states": torch.empty(1, text, 3584, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


def measure(repeats: int, exports: int) -> dict[str, Any]:
    """Return the seconds of tracing, rewriting and torch.export, the ratio, and the parameter counts."""
    small, kwargs = model(2), inputs()
    ppcl_fx.rewrite(ppcl_fx.trace(small, kwargs), Plan(edits=[DepthEdit(stack=STACK, first=0, last=1)]))
    torch.export.export(small, (), kwargs, strict=False)
    teacher = model(60)
    gm = ppcl_fx.trace(teacher, kwargs)
    result: dict[str, Any] = {
        "model": "Qwen-Image, 60 blocks, meta device",
        "teacher_params": sum(p.numel() for p in teacher.parameters()),
        "nodes": len(gm.graph.nodes),
        "trace": timed(lambda: ppcl_fx.trace(teacher, kwargs), repeats),
    }
    for name, plan in ((name, named(plan).plan()) for name, plan in PLANS.items()):
        result[name] = timed(partial(ppcl_fx.rewrite, gm, plan), repeats)
        pluggable = ppcl_fx.rewrite(gm, plan)
        counted = timed(partial(getattr, pluggable, "plan"), 1)
        result[name] |= {
            "plan": PLANS[name],
            "params": pluggable.plan.params,
            "edits": len(plan.edits),
            "counting": counted["least"],
        }
    result["torch_export"] = timed(lambda: torch.export.export(teacher, (), kwargs, strict=False), exports)
    result["times_quicker_than_torch_export"] = round(
        result["torch_export"]["least"] / result["trace"]["least"], 2
    )
    return result


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    exports = (2, "of torch.export, which is slow")
    made = parser("trace", __doc__, repeats=(3, "of tracing and of rewriting"), exports=exports)
    options = made.parse_args(arguments)
    result = measure(options.repeats, options.exports)
    print(f"trace    {result['trace']['least']:8.2f} s   ({result['nodes']} nodes)")
    for name in PLANS:
        print(f"{name:<22} {result[name]['least']:.2f} s   {result[name]['params']:,} parameters")
    print(
        f"torch.export {result['torch_export']['least']:.2f} s: {result['times_quicker_than_torch_export']} x as long"
    )
    return write("trace", options.out, result)

if __name__ == "__main__":
    main(sys.argv[1:])
