"""The small model that ships with the package: it draws 24x24 pictures of coloured shapes.

Importing this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ppcl_fx.shapes.pipeline import ShapesPipeline


def weights_folder() -> Path:
    """Return the folder of the shipped pipeline, in the layout of diffusers."""
    return Path(__file__).resolve().parent / "weights"


def load_pipeline(dtype: torch.dtype | None = None) -> ShapesPipeline:
    """Load the shipped pipeline from disk, its modules in `dtype` (float32 when None); nothing is downloaded. Raises
    PpclError where the weights are missing from the installation.
    """
    import torch

    from ppcl_fx.errors import PpclError
    from ppcl_fx.shapes.pipeline import ShapesPipeline

    folder = weights_folder()
    if not (folder / "model_index.json").is_file():
        raise PpclError(f"no shapes weights in {folder}; run: python -m ppcl_fx.shapes.teach --out {folder}")
    pipeline: ShapesPipeline = ShapesPipeline.from_pretrained(folder, dtype=dtype or torch.float32)
    return pipeline
