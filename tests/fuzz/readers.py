"""The undamaged inputs, what reads them, and which of their changes make another valid input."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import ppcl_fx
from ppcl_fx.calls.store import Calls
from ppcl_fx.cli.analyze import read_prompts
from ppcl_fx.cli.integrity import verify
from ppcl_fx.formats.components import load_model
from ppcl_fx.formats.released import save_released
from ppcl_fx.formats.stock import save_stock
from ppcl_fx.io.files import read_json
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.model.mixtures import mixture
from ppcl_fx.model.rewrite import insert_edits, rewrite
from ppcl_fx.model.sources import open_source
from ppcl_fx.model.student_folder import load_finetuned, save_finetuned
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.costs import Costs
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.shapes.pipeline import ShapesPipeline
from ppcl_fx.tracing import trace
from ppcl_fx.train import config
from ppcl_fx.train.config import TrainConfig
from ppcl_fx.train.core import checkpoints
from ppcl_fx.train.images.captions import open_pairs
from ppcl_fx.train.images.pictures import open_picture
from tests import models
from tests.fuzz import mutations as m
from tests.lora import loras
from tests.shapes_folder import save_pipeline

STACK = "transformer_blocks"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SHARDS = 4
"""Into how many files the sharded model goes."""
LOADING = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}


@dataclass(frozen=True)
class Reader:
    """A folder, what reads it, and the files that are changed.

    Attributes:
        folder: the undamaged folder, within the world's.
        read: gives its result, which can be compared.
        files: file -> the changes that it gets.
        free: whether another result can belong to a changed input: those are files that anybody may write.
        theirs: what another library makes of the same input, which such a result has to be equal to.
    """

    folder: str
    read: Callable[[Path], Any]
    files: Mapping[str, tuple[m.Change, ...]]
    free: bool = False
    theirs: Callable[[Path], Any] | None = None


def build(world: Path) -> dict[str, Reader]:
    """Write every undamaged input into an empty folder, and return what reads them."""
    save_pipeline(world / "model", blocks=2)
    model, kwargs = models.tiny_qwen(blocks=4)
    call = {name: value for name, value in kwargs.items() if value is not None}
    gm = trace(model, kwargs)
    plan = Plan(edits=[DepthEdit(stack=STACK, first=1, last=2), FfnEdit(stack=STACK, block=3)])
    student = rewrite(gm, plan)
    student.save(world / "student")
    save_finetuned(mixture(student, student.edits), student, student.edits, world / "student" / "finetuned")
    _small_files(world, student.plan)
    depth = rewrite(gm, plan.model_copy(update={"edits": plan.edits[:1]}))
    save_stock(depth.plug(students=depth.edits), world / "stock")
    models.tiny_qwen(blocks=4)[0].save_pretrained(world / "sharded", max_shard_size="200KB")  # type: ignore[operator]
    save_released(student.plug(students=student.edits), world / "released")
    shapes = open_source(str(world / "model")).pipeline()
    calls = ppcl_fx.record(shapes, ["a red circle", "two blue squares"], num_inference_steps=2, seed=1)
    calls.save(world / "run" / "calls")
    ppcl_fx.analyze(trace(shapes.transformer, calls.examples()), calls).save(world / "run" / "analysis.json")
    _engines(student, world / "engines")
    _clip(world / "clip")
    loras.save(models.tiny_qwen(blocks=4)[0], world / "lora")
    identity = checkpoints.RunIdentity(plan="p", calls="c", options={"steps": [4]})
    state = checkpoints.State(identity=identity, stage=0, step=2, curves=[])
    checkpoints.save(world / "checkpoints", state, {"a": torch.arange(6.0), "b": torch.ones(2, 3)})
    return _readers(call, gm)


def _readers(call: dict[str, Any], gm: Any) -> dict[str, Reader]:
    student_files = {
        "ppcl.json": m.JSON,
        "plan.json": m.JSON,
        "students.safetensors": m.SAFETENSORS,
        "teacher/config.json": m.JSON,
        f"teacher/{WEIGHTS}": m.SAFETENSORS,
    }
    engine_files = dict.fromkeys(("head.json", "keep-1.json", "keep-0.8.json"), m.JSON)
    onnx_files = dict.fromkeys(("keep-1.onnx", "keep-0.8.onnx"), m.BYTES)
    weight_files = {"weights/float32.safetensors": m.SAFETENSORS}
    model_files = {
        "model_index.json": m.JSON,
        "transformer/config.json": m.JSON,
        f"transformer/{WEIGHTS}": m.SAFETENSORS,
        "text_encoder/config.json": m.JSON,
        f"text_encoder/{WEIGHTS}": m.SAFETENSORS,
        "scheduler/scheduler_config.json": m.JSON,
    }
    folder_files = {"config.json": m.JSON, WEIGHTS: m.SAFETENSORS}
    first = f"{STEM}-00001-of-{SHARDS:05d}.safetensors"
    sharded_files = {f"{STEM}.safetensors.index.json": m.JSON, first: m.SAFETENSORS}
    checkpoint_files = {"state.json": m.JSON, "SHA256SUMS": m.BYTES, "state.safetensors": m.SAFETENSORS}
    picture_files = {f"{n}.{kind}": m.BYTES for n, kind in enumerate(("png", "jpg", "webp", "gif"))}
    return {
        "model": Reader("model", _recorded, model_files, free=True, theirs=_by_diffusers),
        "checkpoint": Reader("model", _streamed, {k: v for k, v in model_files.items() if "transf" in k}, free=True),
        "clip": Reader("clip", lambda f: digest(load_model(CLIPTextModel, f, LOADING).state_dict()),
                       {"config.json": m.JSON, "model.safetensors": m.SAFETENSORS}, free=True,
                           theirs=_clip_by_transformers),
        "student": Reader("student", lambda f: _student(f, call), student_files),
        "fine-tuned": Reader("student", lambda f: _finetuned(f, call),
                             {"finetuned/finetuned.json": m.JSON, "finetuned/model.safetensors": m.SAFETENSORS}),
        "engines": Reader("engines", lambda f: _run_engines(f, call), engine_files | onnx_files | weight_files),
        "engines in torch": Reader("engines", lambda f: _run_engines(f, call, "torch"), engine_files | onnx_files),
        "released": Reader("released", lambda f: _answer(ppcl_fx.load(f), call),
        folder_files | {"pruned.json": m.JSON}, free=True),
        "stock": Reader("stock", lambda f: _answer(open_source(str(f)).transformer(), call), folder_files, free=True,
        theirs=lambda f: _stock_by_diffusers(f, call)),
        "sharded": Reader("sharded", _streamed_here, sharded_files, free=True),
        "tar": Reader("tar", _pictures, {"0.tar": m.BYTES}, free=True),
        "calls": Reader("run", lambda f: _calls(f / "calls"),
                        {"calls/index.json": m.JSON, "calls/calls-00000.safetensors": m.SAFETENSORS}),
        "analysis": Reader("run", lambda f: Redundancy.load(f / "analysis.json"), {"analysis.json": m.JSON}),
        "training": Reader("checkpoints", lambda f: digest(checkpoints.read(f / "00-00000002").tensors),
                           {f"00-00000002/{name}": how for name, how in checkpoint_files.items()}),
        "plan": Reader("files", lambda f: _planned(f / "plan.json", gm), {"plan.json": m.JSON}, free=True),
        "costs": Reader("files", lambda f: Costs.load(f / "costs.json"), {"costs.json": m.JSON}, free=True),
        "config": Reader("files", lambda f: config.resolve(f / "train.toml"), {"train.toml": m.TOML}, free=True),
        "prompts": Reader("files", lambda f: read_prompts(f / "prompts.txt"), {"prompts.txt": m.BYTES}, free=True),
        "pictures": Reader("pictures", _pictures, picture_files | {"metadata.jsonl": m.LINES}, free=True),
        "lora": Reader("lora", lambda f: _with_lora(f, gm), {loras.FILE: m.SAFETENSORS}, free=True),
    }  # fmt: skip


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one hash of named tensors."""
    return hashlib.sha256(json.dumps({n: tensor_digest(t) for n, t in sorted(tensors.items())}).encode()).hexdigest()


def _output(model: Any, call: dict[str, Any]) -> str:
    with torch.no_grad():
        return tensor_digest(model(**call)[0])


def _answer(model: Any, call: dict[str, Any]) -> str:
    """Return the output, or what a model's class raises where only a call shows that the configuration is wrong."""
    try:
        return _output(model, call)
    except (RuntimeError, ValueError, TypeError, IndexError, ppcl_fx.PpclError) as error:
        return type(error).__name__


def _recorded(folder: Path) -> str:
    from ppcl_fx.cli.analyze import _record
    from ppcl_fx.cli.terminal import Terminal
    from ppcl_fx.passes.options import AnalyzeConfig

    return _drawn(
        _record(
            open_source(str(folder)),
            ["a red circle"],
            AnalyzeConfig(batch_size=1, steps=1, seed=0),
            Terminal(False),
        )[1]
    )


def _by_diffusers(folder: Path) -> str:
    return _drawn(ppcl_fx.record(ShapesPipeline.from_pretrained(folder, dtype=torch.float32), ["a red circle"],
        num_inference_steps=1, seed=0, batch_size=1))  # fmt: skip


def _drawn(calls: Calls) -> str:
    kept = {f"{n}.{name}": v for n, call in enumerate(calls) for name, v in call.kwargs.items() if torch.is_tensor(v)}
    return digest(kept | {f"{n}": call.output for n, call in enumerate(calls) if call.output is not None})


def _streamed(folder: Path) -> str:
    return _streamed_here(folder / "transformer")


def _streamed_here(folder: Path) -> str:
    checkpoint = open_source(str(folder)).checkpoint()
    found = {name: checkpoint.tensor(name).clone() for name in checkpoint.model.state_dict()}
    checkpoint.shards.close()
    return digest(found)


def _clip(folder: Path) -> None:
    form = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "projection_dim": 16}
    config = CLIPTextConfig(**form, num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder)


def _clip_by_transformers(folder: Path) -> str:
    return digest(CLIPTextModel.from_pretrained(folder, dtype=torch.float32).state_dict())


def _stock_by_diffusers(folder: Path, call: dict[str, Any]) -> str:
    from diffusers import QwenImageTransformer2DModel

    return _answer(QwenImageTransformer2DModel.from_pretrained(folder, dtype=torch.float32), call)


def _student(folder: Path, call: dict[str, Any]) -> list[str]:
    shutil.rmtree(folder / "finetuned")
    verify(folder)
    model = ppcl_fx.load(folder)
    assert isinstance(model, ppcl_fx.PluggableModel)
    return [_output(model.plug(students=students), call) for students in (model.edits, [])]


def _finetuned(folder: Path, call: dict[str, Any]) -> str:
    verify(folder)
    model = ppcl_fx.load(folder)
    assert isinstance(model, ppcl_fx.PluggableModel)
    graph = load_finetuned(model, folder / "finetuned")
    inputs = {name: value for name, value in call.items() if name in graph.meta["ppcl"]["inputs"]}
    return _output(graph, inputs)


def _engines(student: Any, folder: Path) -> None:
    from ppcl_fx.export import ExportConfig, export

    export(student, folder, ExportConfig(keep=(1.0, 0.8), runs=1))


def _run_engines(folder: Path, call: dict[str, Any], backend: str = "onnxruntime") -> frozenset[str]:
    if backend == "onnxruntime":
        verify(folder)
    engine = ppcl_fx.EngineTransformer(folder, backend=backend)
    return frozenset(_output(engine.plug(keep=keep), call) for keep in engine.keeps)


def _calls(folder: Path) -> str:
    calls = Calls.open(folder)
    return calls.fingerprint + _drawn(calls)


def _planned(path: Path, gm: Any) -> list[str]:
    plan = read_json(path, Plan)
    insert_edits(gm, plan)
    return plan.ids


def _with_lora(folder: Path, gm: Any) -> int:
    model = rewrite(gm, Plan(edits=[DepthEdit(stack=STACK, first=1, last=2)]))
    model.load_lora_adapter(folder / loras.FILE)
    model.unload_lora()
    return 0


def _pictures(folder: Path) -> list[Any]:
    found = []
    for pair in open_pairs(folder):
        try:
            found.append(open_picture(pair.read()).size)
        except (ppcl_fx.PpclError, OSError) as error:  # a bad picture is left out of a training, with this line
            if "\n" in str(error):
                raise RuntimeError(f"several lines: {error}") from error
            found.append("left out")
    return found


def _small_files(world: Path, plan: Plan) -> None:
    files, pictures = world / "files", world / "pictures"
    files.mkdir()
    pictures.mkdir()
    (files / "plan.json").write_text(plan.model_dump_json())
    block = {"whole": 2.0, "ffn": 1.0}
    stack = {"path": STACK, "first": 0, "blocks": [block] * 4}
    (files / "costs.json").write_text(
        json.dumps({"model": "m", "repeats": 3, "rest": 1.0, "forward": 9.5, "stacks": [stack]})
    )
    config.save(TrainConfig(), files / "train.toml")
    (files / "prompts.txt").write_text(
        "a red circle\n\ntwo blue squares\nein grüner Kreis\n", encoding="utf-8"
    )
    lines = []
    for number, (kind, mode) in enumerate((("png", "RGBA"), ("jpg", "RGB"), ("webp", "RGB"), ("gif", "P"))):
        Image.effect_noise((40, 24), 60).convert(mode).save(pictures / f"{number}.{kind}")
        lines.append(json.dumps({"file_name": f"{number}.{kind}", "text": f"picture {number}"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (world / "tar").mkdir()
    with tarfile.open(world / "tar" / "0.tar", "w") as archive:
        for number, kind in enumerate(("png", "jpg")):
            (world / f"{number}.txt").write_text(f"picture {number}")
            archive.add(pictures / f"{number}.{kind}", f"{number}.{kind}")
            archive.add(world / f"{number}.txt", f"{number}.txt")
