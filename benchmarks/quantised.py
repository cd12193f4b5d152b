"""What weights in few bits cost on the model that ships: the score of each ratio in INT8, INT4 and FP8, and file sizes.

    python -m benchmarks.quantised build/demo/student --calls build/demo/calls

Each file that an export wrote is drawn with, in onnxruntime, on the same prompts and noise as the model in float32.
Scores that ``--work`` holds are not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, spread, write
from ppcl_fx import EngineTransformer, PluggableModel
from ppcl_fx.calls.store import Calls
from ppcl_fx.export import ExportConfig, Translations, export
from ppcl_fx.export.store.manifest import Manifest
from ppcl_fx.export.store.names import manifest_path
from ppcl_fx.io.files import read_json, write_json
from ppcl_fx.shapes.score import score

FEW = ("int8", "int4", "fp8")


def files(
    model: PluggableModel, calls: Calls, work: Path, keeps: Sequence[float], errors: Mapping[str, float | None]
) -> dict[str, Path]:
    """Export a model at each ratio with weights of each kind, within an error of each; return the folders."""
    known, found = Translations(), {}
    for way, error in errors.items():
        found[way] = work / (way if error is None else f"{way}-{error:g}")
        if not (found[way] / "head.json").is_file():
            config = ExportConfig.merged(None, {"keep": tuple(keeps), "weights": way, "weight_error": error, "runs": 1})
            export(model, found[way], config, calls=calls, known=known)
            print(f"exported {found[way].name}", flush=True)
    return found


def described(folder: Path, keep: float) -> dict[str, Any]:
    """What the manifest of a ratio says of its weights."""
    graph = next(graph for graph in folder.glob("*.onnx") if read_json(manifest_path(graph), Manifest).keep == keep)
    card = read_json(manifest_path(graph), Manifest)
    few = card.quantised
    size = few.bytes if few is not None else 4 * card.params_in_file
    told = {} if few is None else {"block": few.block, "layers": few.layers, "kept": len(few.kept)}
    found: dict[str, Any] = {"weight_bytes": size, **told}
    if few is not None:
        found["added_error"] = round(few.added_error, 5)
    return found


def scored(folder: Path, keep: float, seeds: Sequence[int], per_category: int, work: Path) -> list[float]:
    """Return the score of a ratio for each seed."""
    pipeline, scores = shapes_pipeline(), []
    for seed in seeds:
        path = work / f"{folder.name}-{keep:g}-{seed}-{per_category}.json"
        if not path.is_file():
            pipeline.transformer = EngineTransformer(folder, keep=keep, backend="onnxruntime", device="cpu")
            write_json(path, score(pipeline, per_category, seed))
            print(f"{path.stem}: {json.loads(path.read_text())['overall']:.4f}", flush=True)
        scores.append(float(json.loads(path.read_text())["overall"]))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    made = parser(
        "quantised",
        __doc__,
        calls=(Path("build/demo/calls"), "recorded calls"),
        keeps=("1.0,0.7,0.6,0.5", "shares of the parameters"),
        errors=("0.003,0.015,0.015", "largest error that INT8, INT4 and FP8 may add to the model's output"),
        seeds=("0,1,2", "seeds of prompts and noise"),
        per_category=(64, "prompts scored a category"),
        work=(Path("build/quantised"), "exported files and finished scores"),
    )
    made.add_argument("student", type=Path, help="the pluggable model")
    options = made.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    keeps, seeds = [float(part) for part in options.keeps.split(",")], [int(part) for part in options.seeds.split(",")]
    model = ppcl_fx.load(options.student)
    assert isinstance(model, PluggableModel)
    errors = {"stored": None, **dict(zip(FEW, map(float, options.errors.split(",")), strict=True))}
    folders = files(model, Calls.open(options.calls), options.work, keeps, errors)
    rows = []
    for keep in keeps:
        exact = scored(folders["stored"], keep, seeds, options.per_category, options.work)
        for way, folder in folders.items():
            own = scored(folder, keep, seeds, options.per_category, options.work)
            lost = [100 * (before - after) for before, after in zip(exact, own, strict=True)]
            row = {"keep": keep, "weights": way, "weight_error": errors[way], **described(folder, keep)}
            rows.append(row | {"score": spread(own), "scores": own, "points_lost": spread(lost)})
            size = row["weight_bytes"] / 2**20
            mean, lost_mean = rows[-1]["score"]["mean"], sum(lost) / len(lost)
            print(f"{keep:<4g} {way:<7} {size:6.2f} MiB  score {mean:.4f}, points lost {lost_mean:.2f}")
    write("quantised", options.out, {"per_category": options.per_category, "seeds": seeds, "table": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
