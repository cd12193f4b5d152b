"""The passes that write what a calibration found on the nodes of the graph: probes, curves, text streams, FFN fits."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.meta import NodeInfo, node_info
from ppcl_fx.passes.analysis.intervals import first_difference
from ppcl_fx.passes.analysis.similarity import Average, cka, represent
from ppcl_fx.passes.calibration.calibration import Calibration
from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.schema.analysis import FfnFit


@dataclass(frozen=True)
class _Calibrated:
    calibration: Calibration

    def requires(self, gm: GraphModule) -> None:
        """Raise `PpclError` if the calibration is of another graph."""
        if gm.graph is not self.calibration.gm.graph:
            raise PpclError("the measurements belong to another graph; run calibrate() on this one first")


@dataclass(frozen=True)
class LinearProbes(_Calibrated, Pass, name="linear-probes", kind="analysis", numerics="exact"):
    """Write the relative fit of every block's and stream's solved probe to the block's output nodes.

    Annotates ``node.meta["ppcl"]`` with ``fit`` (Eq. 2 relative to the block's own change) and ``energy`` (the mean
    squared length of a token of the block's output).
    """

    def apply(self, gm: GraphModule) -> Result:
        for site in self.calibration.streams:
            for node, (fit, energy) in zip(site.outputs, self.calibration.fits(site), strict=True):
                node_info(node).update({"fit": fit, "energy": energy})
        return Result(gm, modified=False)


@dataclass(frozen=True)
class Similarity(_Calibrated, Pass, name="similarity", kind="analysis", numerics="exact"):
    """Compute the CKA curves of every stack and stream, and write row u to block u's output node.

    Annotates ``node.meta["ppcl"]`` with ``cka``, ``delta``, ``gap`` and ``similarity``: lists over the stack's blocks
    (`ppcl_fx.schema.analysis.StreamCurves` says what they hold).
    """

    def apply(self, gm: GraphModule) -> Result:
        for site in self.calibration.streams:
            found = self.calibration.curves(site)
            delta = first_difference(found.cka)
            for u, node in enumerate(site.outputs):
                rows: NodeInfo = {"cka": found.cka[u], "delta": delta[u], "gap": found.gap[u]}
                node_info(node).update({**rows, "similarity": found.similarity[u]})
        return Result(gm, modified=False)


@dataclass(frozen=True)
class TextSimilarity(_Calibrated, Pass, name="text-similarity", kind="analysis", numerics="exact"):
    """CKA between the text state that enters a block and the one that leaves it, for each block of each stack.

    This is what a text-stream edit is chosen by (appendix 6). Annotates the text output nodes with
    ``node.meta["ppcl"]["text_similarity"]`` (float, or None where no sample has two different tokens). A stack without
    a stream of this name is left alone.
    """

    stream: str = "text"

    def apply(self, gm: GraphModule) -> Result:
        for site in self.calibration.streams:
            if site.stream != self.stream:
                continue
            means = Average(len(site.outputs))
            for states in self.calibration.batches(site):
                before = represent(states[0])
                for position, state in enumerate(states[1:]):
                    after = represent(state)
                    means.add(position, position, cka(before, after))
                    before = after
            for position, (node, row) in enumerate(zip(site.outputs, means.matrix(), strict=True)):
                node_info(node)["text_similarity"] = row[position]
        return Result(gm, modified=False)


@dataclass(frozen=True)
class FfnFits(_Calibrated, Pass, name="ffn-fit", kind="analysis", numerics="exact"):
    """Fit ``h + W h + b`` to each feed-forward by least squares, over the tokens that are not held out.

    This is what an FFN edit is chosen by (appendix 6). Annotates the node after the gated feed-forward with
    ``node.meta["ppcl"]["ffn"]``, a `ppcl_fx.schema.analysis.FfnFit`, whose numbers are of the held-out tokens.
    """

    def apply(self, gm: GraphModule) -> Result:
        for (block, site), found in zip(self.calibration.ffn, self.calibration.ffn_fits(), strict=True):
            fit = FfnFit(block=block.index, stream=site.stream, error=found.error, similarity=found.cosine)
            node_info(site.after)["ffn"] = fit
        return Result(gm, modified=False)
