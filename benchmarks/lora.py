"""A LoRA made with PEFT on the shipped teacher, and what it does on a pruned student.

    python -m benchmarks.lora --student build/demo/student

The LoRA teaches a style: red and blue light are exchanged. A picture has the style when it shows what its prompt asks
after the two channels are exchanged back. The student never saw it: the file is loaded by the teacher's block numbers.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import QwenImageLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional

import ppcl_fx
from benchmarks.clock import parser, shapes_pipeline, write
from ppcl_fx.errors import PpclError
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.shapes.captions import CATEGORIES, every_prompt, prompts
from ppcl_fx.shapes.checker import check
from ppcl_fx.shapes.drawing import draw_prompts
from ppcl_fx.shapes.pipeline import SIDE, ShapesPipeline, pack
from ppcl_fx.shapes.score import generate

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"]
RANK = 8
BATCH = 32


def styled(pictures: torch.Tensor) -> torch.Tensor:
    """Exchange red and blue of pictures (batch, 3, height, width); twice is the picture itself."""
    return pictures.flip(-3)


def teach(pipeline: ShapesPipeline, steps: int, rate: float) -> list[float]:
    """Give the pipeline's transformer a LoRA by PEFT and train it on pictures in the style; return the losses."""
    model: Any = pipeline.transformer
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    source, generator, losses = random.Random(0), torch.Generator().manual_seed(0), []
    for step in range(steps):
        chosen = [source.choice(every_prompt(source.choice(CATEGORIES))) for _ in range(BATCH)]
        tokens = pack(styled(draw_prompts(chosen, source)))
        noise = torch.randn(tokens.shape, generator=generator)
        level = torch.sigmoid(torch.randn(BATCH, generator=generator) * 1.1 + 0.5)
        mix = level[:, None, None]
        velocity = model(
            hidden_states=(1 - mix) * tokens + mix * noise,
            encoder_hidden_states=pipeline.text_encoder.encode([prompt.text for prompt in chosen]),
            timestep=level,
            img_shapes=[[(1, SIDE, SIDE)]] * BATCH,
            return_dict=False,
        )[0]
        loss = functional.mse_loss(velocity, noise - tokens)
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def scores(pipeline: ShapesPipeline, transformer: Any, per_category: int) -> dict[str, float]:
    """Share of pictures that show their prompt as they are, and with the channels exchanged back."""
    own, pipeline.transformer = pipeline.transformer, transformer
    try:
        wanted = [prompt for category in CATEGORIES for prompt in prompts(category, per_category, 0)]
        pictures = generate(pipeline, wanted)
    finally:
        pipeline.transformer = own
    found = {}
    for name, shown in (("plain", pictures), ("style", styled(pictures))):
        right = [check(picture, prompt) for picture, prompt in zip(shown, wanted, strict=True)]
        found[name] = round(sum(right) / len(right), 4)
    return found


def measure(student: Path, file: Path, steps: int, rate: float, per_category: int) -> dict[str, Any]:
    """Train the LoRA, write it in diffusers' layout, and score teacher and student without and with it."""
    pipeline = shapes_pipeline()
    model = ppcl_fx.load(student)
    if not isinstance(model, PluggableModel):
        raise PpclError(f"{student}: not a pluggable model; give the folder that `ppcl-fx train` or the demo wrote")
    result: dict[str, Any] = {"rank": RANK, "targets": TARGETS, "steps": steps, "per_category": per_category}
    rows = {"teacher": {"without": scores(pipeline, pipeline.transformer, per_category)}}
    begin = time.perf_counter()
    losses = teach(pipeline, steps, rate)
    result["training_seconds"] = round(time.perf_counter() - begin, 1)
    result["loss"] = {
        "first_20": round(sum(losses[:20]) / 20, 4),
        "last_20": round(sum(losses[-20:]) / 20, 4),
    }
    rows["teacher"]["with"] = scores(pipeline, pipeline.transformer, per_category)
    adapter: Any = pipeline.transformer
    QwenImageLoraLoaderMixin.save_lora_weights(
        file, transformer_lora_layers=get_peft_model_state_dict(adapter)
    )
    name = "every edit at the teacher"
    for keep in (1.0, 0.7, 0.5):
        model.plug(keep=keep)
        row = {"without": scores(pipeline, model, per_category)}
        model.load_lora_adapter(file, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
        row["with"] = scores(pipeline, model, per_category)
        row["report"] = str(model.lora_report("style"))  # type: ignore[assignment]
        model.delete_adapters("style")
        rows[name if keep == 1.0 else f"{keep:.0%}"] = row
    return {**result, "rows": rows}


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print and write the result; return its path."""
    made = parser(
        "lora",
        __doc__,
        student=(Path("build/demo/student"), "a pluggable model"),
        steps=(300, "of training the LoRA"),
        lr=(3e-3, "peak learning rate"),
        per_category=(24, "prompts scored a category"),
        lora=(Path("build/lora"), "folder of the LoRA"),
    )
    options = made.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    result = measure(options.student, options.lora, options.steps, options.lr, options.per_category)
    for name, row in result["rows"].items():
        print(f"{name:<26} without {row['without']}   with {row['with']}   {row.get('report', '')}")
    return write("lora", options.out, result, ("torch", "diffusers", "peft", "ppcl-fx"))

if __name__ == "__main__":
    main(sys.argv[1:])
