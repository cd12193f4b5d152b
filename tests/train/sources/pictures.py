"""Pictures and folders of them, for the tests of pictures as data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CAPTIONS = ["a red circle", "a blue square", "two red circles"]


def picture(seed: int, height: int = 24, width: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, count: int, height: int = 24, width: int = 24) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(picture(i, height, width)))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )
