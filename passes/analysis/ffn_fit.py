"""How well a linear projector stands in for each feed-forward: what an FFN edit is chosen by (appendix 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from ppcl_fx.ir.meta import node_info
from ppcl_fx.passes.contract import Pass, Result

if TYPE_CHECKING:
    from ppcl_fx.passes.calibration.calibration import Calibration


@dataclass(frozen=True)
class FfnFits(Pass, name="ffn-fit", kind="analysis", numerics="exact"):
    """Fit ``h + W h + b`` to each feed-forward by least squares, over the tokens that are not held out.

    Annotates the node after the gated feed-forward with ``node.meta["ppcl"]["ffn"]``, a
    `ppcl_fx.schema.analysis.FfnFit`: the squared error relative to what the feed-forward adds, and the cosine of
    the states after it, real and projected, on the held-out tokens.
    """

    calibration: Calibration

    def requires(self, gm: GraphModule) -> None:
        """Raises `PpclError` if the measurements are of another graph."""
        self.calibration.require(gm)

    def apply(self, gm: GraphModule) -> Result:
        from ppcl_fx.schema.analysis import FfnFit

        for (block, site), found in zip(self.calibration.ffn, self.calibration.ffn_fits(), strict=True):
            fit = FfnFit(block=block.index, stream=site.stream, error=found.error, similarity=found.cosine)
            node_info(site.after)["ffn"] = fit
        return Result(gm, modified=False)
