"""An engine of a model of real size with weights in few bits, built without a GPU: time, memory of the builder, size.

    python -m benchmarks.engine                                   # the paper's 10 B student of Qwen-Image, INT4
    python -m benchmarks.engine --weights int8 --blocks 2,4,8     # teachers of fewer blocks of that width

The weights are random values of the real sizes: what the compiler does does not depend on them. So they are not
rounded for calls. The engine is for one compute capability and is built at the builder's lowest level; it was never
run. Each is built in a process of its own, whose memory is the resident one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.clock import parser, write
from benchmarks.streaming import calls, config
from ppcl_fx.export import ExportConfig, Translations
from ppcl_fx.export.one_graph import ExportedMixture, GraphExport, Job
from ppcl_fx.export.quantising import Rounding
from ppcl_fx.export.store.weight_source import WeightSource
from ppcl_fx.export.store.weight_store import stored
from ppcl_fx.export.tensorrt.build import build_engine
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Spec
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.export.tensorrt_api import load_builder
from ppcl_fx.io.memory import parse_size
from ppcl_fx.model.paper_plans import named
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.passes.quantisation.layers import linear_layers
from ppcl_fx.passes.quantisation.quantise import Quantised
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme, Weights
from ppcl_fx.passes.quantisation.shelf import Shelf
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import skeleton

WHOLE = 60
"""Blocks of Qwen-Image."""
SPEC = Spec(batch="1-1", tokens="1024-6889", text="1-512")
"""Pictures of 512x512 to 1328x1328 pixels."""


class RandomWeights(Shelf):
    """Weights in few bits of the right sizes and of random values, made when they are asked for."""

    def __init__(self, scheme: Scheme, gm: GraphModule) -> None:
        super().__init__(scheme)
        self.gm, self._generator = gm, torch.Generator().manual_seed(0)

    def __getitem__(self, name: str) -> QuantisedWeight:
        rows, columns = self.gm.get_parameter(name).shape
        limit = int(min(self.scheme.largest, 127))
        values = torch.randint(-limit, limit + 1, (rows, columns), generator=self._generator, dtype=torch.int8)
        scales = torch.full((rows, columns // self.scheme.width(columns)), 0.02 / limit, dtype=self.scheme.scale)
        return QuantisedWeight(self.scheme, values, scales)


def mixture(blocks: int, heads: int) -> tuple[GraphModule, float, tuple[str, ...]]:
    """Return a graph without weights: the paper's 10 B student of all blocks, or a teacher of fewer."""
    model = skeleton(QwenImageTransformer2DModel, config(blocks, heads), torch.bfloat16)
    gm = trace(model, calls(1, 1, 64, 64).examples())
    if blocks < WHOLE:
        return gm, 1.0, ()
    paper = named("paper:qwen-image-10b")
    plan = paper.plan()
    pluggable = PluggableModel(insert_edits(gm, plan), plan)
    chosen = paper.students(pluggable)
    plugged = pluggable.plug(students=chosen)
    return plugged.graph_module(), plugged.param_count() / pluggable.teacher_params, tuple(chosen)


def exported(folder: Path, blocks: int, heads: int, scheme: Scheme) -> dict[str, Any]:
    """Write the graph and its weights in few bits; return what it took."""
    begin = time.perf_counter()
    gm, keep, chosen = mixture(blocks, heads)
    generator = torch.Generator().manual_seed(1)

    def read(name: str) -> Tensor:
        like = gm.state_dict()[name]
        return torch.randn(like.shape, generator=generator).mul(0.02).to(like.dtype)

    names = {f"{path}.weight": 0.0 for path in linear_layers(gm)}
    source = WeightSource(gm, read).with_quantised(Quantised(RandomWeights(scheme, gm), names, {}, {}))
    pieces = source.pieces(gm)
    needed = {name for some in pieces.values() for piece in some for name in source.stored_as(piece.name)}
    few = Rounding(source, 0, {gm: 0.0})
    job = Job(ExportConfig(weights=scheme.weights, dtype="bf16", memory_limit=1), Translations())
    with stored(source, needed, folder, [], print) as store:
        work = GraphExport(job, source, store, None, "random weights", None, few)
        done = work.export(ExportedMixture(gm, keep, chosen, folder / "keep-0.5.onnx"))
    return {
        "params": sum(parameter.numel() for parameter in gm.parameters()),
        "layers_in_few_bits": len(names),
        "graph_bytes": done.onnx.stat().st_size,
        "weight_bytes": sum(file.stat().st_size for file in (folder / "weights").iterdir()),
        "export_seconds": round(time.perf_counter() - begin, 1),
    }


def built(folder: Path, memory: int | None) -> dict[str, Any]:
    """Build the engine; return its size, and what it took."""
    onnx = folder / "keep-0.5.onnx"
    request = BuildConfig(spec=SPEC, library="rtx")
    options = BuildOptions(gpu=("8.9",), level=0, builder_memory=memory)
    card = build_engine(
        onnx, onnx.with_suffix(".engine"), request.profiles(onnx), options, api=load_builder("", "rtx")
    )
    return {
        "engine_bytes": card.engine.bytes,
        "layers": card.layers,
        "build_seconds": round(card.seconds, 1),
        "peak_resident_gib": None if card.peak_memory is None else round(card.peak_memory / 2**30, 2),
        "library": f"TensorRT for RTX {card.tensorrt}",
        "capabilities": card.capabilities,
    }


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    made = parser(
        "engine",
        __doc__,
        blocks=(str(WHOLE), f"blocks of width 3072, several sizes with commas; {WHOLE} is the paper's 10 B student"),
        heads=(24, "heads of 128 channels"),
        weights=("int4", "int4 or int8"),
        block=(64, "weights of a row that share a scale, in INT4"),
        memory=("", "what the process that builds may hold, such as 20GiB"),
        scratch=("", "folder for the files (default: the system's)"),
    )
    options = made.parse_args(arguments)
    limit = parse_size("--memory", options.memory) if options.memory else None
    weights, rows = cast(Weights, options.weights), []
    scheme = Scheme(weights, options.block if weights == "int4" else None, torch.bfloat16)
    for blocks in [int(part) for part in options.blocks.split(",")]:
        folder = Path(tempfile.mkdtemp(prefix="ppcl-engine-", dir=options.scratch or None))
        try:
            row = {"blocks": blocks, "weights": weights, **exported(folder, blocks, options.heads, scheme)}
            print(row, flush=True)
            rows.append(row | built(folder, limit))
            print(rows[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    model = f"Qwen-Image, width {128 * options.heads}, random weights"
    result = {"model": model, "block": options.block, "table": rows}
    packages = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir", "ppcl-fx")
    return write(f"engine-{options.weights}", options.out, result, packages)


if __name__ == "__main__":
    main(sys.argv[1:])
