"""The training core: stages, losses, the optimiser, checkpoints."""

from __future__ import annotations
