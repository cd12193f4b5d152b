"""Exporting five ratios of a model that does not fit in memory: time, peak memory, bytes on disk.

The model is Qwen-Image with 60 blocks, 20.4 B parameters in bf16, and the students of the paper's Eq. 13. Its files
have real headers and no content: they are sparse, so the disk holds next to nothing and reading gives zeros. Graphs,
checks and hashes take the same time for any values; every byte is hashed. What a cold disk would add is the files'
size over the disk's speed. The graphs are written into the student's folder, so no weight is copied. The export runs
in a process of its own; memory as in `benchmarks.streaming`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from benchmarks.clock import apart, parser, write
from benchmarks.streaming import Peak, calls, config, plan
from ppcl_fx.io.files import write_json
from ppcl_fx.io.shards import INDEX, Form, form_bytes
from ppcl_fx.model.pluggable import STUDENTS, TEACHER, PluggableModel, student_forms
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.tracing import trace
from ppcl_fx.tracing.meta_model import skeleton

SHARD = 10 * 10**9
"""Bytes of one file of the checkpoint, as on the hub."""

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def sparse(path: Path, forms: Mapping[str, Form]) -> None:
    """Write a safetensors file of the right size in which nothing but the header is written."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in forms.items():
        size = form_bytes({name: (dtype, shape)})
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def make(folder: Path, blocks: int, heads: int) -> None:
    """Write a student folder without content."""
    model = skeleton(QwenImageTransformer2DModel, config(blocks, heads), torch.bfloat16)
    gm = trace(model, calls(1, 1, 64, 64).examples())
    edits = plan(blocks)
    pluggable = PluggableModel(insert_edits(gm, edits), edits)
    folder.mkdir()
    pluggable.save_head(folder)
    sparse(folder / STUDENTS, student_forms(pluggable.graph))
    shards: list[dict[str, Form]] = [{}]
    for name, tensor in model.state_dict().items():
        form = (tensor.dtype, tuple(tensor.shape))
        if form_bytes(shards[-1]) + form_bytes({name: form}) > SHARD:
            shards.append({})
        shards[-1][name] = form
    weight_map: dict[str, str] = {}
    for number, forms in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        sparse(folder / TEACHER / file, forms)
        weight_map |= dict.fromkeys(forms, file)
    size = sum(form_bytes(forms) for forms in shards)
    write_json(folder / TEACHER / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def measure(folder: Path, keeps: list[float]) -> dict[str, Any]:
    """Export in this process."""
    from ppcl_fx.export import ExportConfig, export
    from ppcl_fx.export.store.names import WEIGHTS
    from ppcl_fx.model.student_folder import StudentFolder

    peak = Peak()
    peak.start()
    begin, used = time.perf_counter(), time.process_time()
    notes: list[str] = []
    opened = StudentFolder.open(folder)
    opening = time.perf_counter() - begin
    made = export(opened, folder, ExportConfig(keep=tuple(keeps), memory_limit=1), note=notes.append)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "seconds_opening": round(opening, 1),
        "ratios": [
            {"keep": r.keep, "params": r.params, "seconds": round(r.seconds, 1), "graph_bytes": r.onnx.stat().st_size}
            for r in made.ratios
        ],
        "weights_bytes": sum(p.stat().st_size for p in folder.rglob("*.safetensors")),
        "second_copy": (folder / WEIGHTS).exists(),
        "notes": notes,
        **peak.result(),
    }


def main(arguments: list[str] | None = None) -> Path | None:
    """Measure, print and write the result; return its path."""
    options = _options(arguments)
    keeps = [float(share) for share in options.keep.split(",")]
    if options.part is not None:
        print(json.dumps(measure(options.part, keeps)))
        return None
    scratch = Path(tempfile.mkdtemp(prefix="ppcl-export-", dir=options.scratch))
    try:
        folder = scratch / "student"
        make(folder, options.blocks, options.heads)
        found = apart("export", options, ["keep"], "--part", str(folder))
    finally:
        shutil.rmtree(scratch)
    result = {
        "model": f"Qwen-Image, {options.blocks} blocks of width {128 * options.heads}, bf16, sparse files",
        "conditions": options.note,
        **found,
    }
    graphs = sum(ratio["graph_bytes"] for ratio in found["ratios"])
    print(f"{len(keeps)} ratios in {found['seconds']:.0f} s, at most {found['peak_anonymous_gib']:.2f} GiB")
    print(f"graphs {graphs / 2**20:.1f} MiB over weights of {found['weights_bytes'] / 2**30:.1f} GiB")
    packages = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir", "ppcl-fx")
    return write("export", options.out, result, packages)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(
        "export",
        __doc__,
        blocks=(60, "blocks"),
        heads=(24, "heads of 128 channels"),
        keep=("1.0,0.9,0.8,0.7,0.6", "shares"),
        note=("", "what else the machine did, for the result"),
    )
    made.add_argument("--scratch", default=None, help="folder for the checkpoint (default: the system's)")
    made.add_argument("--part", type=Path, default=None, help=argparse.SUPPRESS)
    return made.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
