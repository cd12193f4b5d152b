"""How little each block changes the text stream: what a text-stream edit is chosen by (appendix 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from ppcl_fx.ir.meta import node_info
from ppcl_fx.passes.analysis.similarity import cka, represent
from ppcl_fx.passes.contract import Pass, Result

if TYPE_CHECKING:
    from ppcl_fx.passes.calibration.calibration import Calibration


@dataclass(frozen=True)
class TextSimilarity(Pass, name="text-similarity", kind="analysis", numerics="exact"):
    """CKA between the text state that enters a block and the one that leaves it, for each block of each
    stack.

    The first block of a stack is compared with what enters the stack. Annotates the text output nodes with
    ``node.meta["ppcl"]["text_similarity"]`` (float, or None where no sample has two different tokens). A
    stack without a stream of this name is left alone.
    """

    calibration: Calibration
    stream: str = "text"

    def requires(self, gm: GraphModule) -> None:
        """Raises `PpclError` if the measurements are of another graph."""
        self.calibration.require(gm)

    def apply(self, gm: GraphModule) -> Result:
        for site in self.calibration.streams:
            if site.stream != self.stream:
                continue
            sums = torch.zeros(len(site.outputs), dtype=torch.float64)
            counts = torch.zeros(len(site.outputs), dtype=torch.int64)
            for states in self.calibration.batches(site):
                before = represent(states[0])
                for position in range(len(site.outputs)):
                    after = represent(states[position + 1])
                    values, before = cka(before, after), after
                    known = values[~values.isnan()]
                    sums[position] += known.double().sum().cpu()
                    counts[position] += len(known)
            for node, total, count in zip(site.outputs, sums.tolist(), counts.tolist(), strict=True):
                node_info(node)["text_similarity"] = total / count if count else None
        return Result(gm, modified=False)
