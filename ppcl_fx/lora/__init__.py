"""LoRA by the teacher's block numbers: reading key layouts, fusing into weights, the methods that pipelines call."""

from __future__ import annotations

from ppcl_fx.lora.adapters import LoraReport as LoraReport
