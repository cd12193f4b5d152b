"""Linear CKA and the curves it gives: surrogate curves (Eq. 3), the gap of Eq. 6, heatmaps; and the pass
`Similarity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from ppcl_fx.passes.contract import Pass, Result
from ppcl_fx.passes.precision import products_of
from ppcl_fx.passes.probes import Projector
from ppcl_fx.redundancy import Matrix

if TYPE_CHECKING:
    from ppcl_fx.passes.measure import Measurement


@dataclass(frozen=True)
class Representation:
    """Samples' tokens ready for CKA: centred features ``[B, T, D]``, or their Gram matrices ``[B, T, T]``, of
    norm 1.

    `features` have ``||X^T X||_F = 1`` (and so has ``X X^T``, which `gram` holds where that is the cheaper
    form); `defined` is false for samples whose tokens are all alike: their CKA is 0 / 0.
    """

    features: Tensor
    gram: Tensor | None
    defined: Tensor


def represent(x: Tensor) -> Representation:
    """Centre ``[B, T, D]`` over its tokens and scale each sample so that its own HSIC is 1."""
    x = x.float()
    centred = x - x.mean(dim=1, keepdim=True)
    # Scaled by its norm first: squares of squares of large activations would overflow.
    size = centred.flatten(1).norm(dim=1)
    # Rounding leaves the mean of equal tokens off by an ulp or so: what is left of them then is noise.
    defined = size > 1e-6 * x.flatten(1).norm(dim=1)
    centred = centred / torch.where(defined, size, 1.0)[:, None, None]
    tokens, width = centred.shape[1:]
    gram = centred @ centred.mT if tokens <= width else None
    own = (centred.mT @ centred if gram is None else gram).flatten(1).norm(dim=1)
    own = torch.where(defined, own, 1.0)[:, None, None]
    return Representation(centred / own.sqrt(), None if gram is None else gram / own, defined)


def cka(a: Representation, b: Representation) -> Tensor:
    """Linear CKA of each sample, ``[B]``, NaN where undefined.

    ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)``, or the same number from the Gram matrices, ``<X X^T, Y
    Y^T>`` over their norms, where there are fewer tokens than channels.
    """
    if a.gram is not None and b.gram is not None:
        value = (a.gram * b.gram).sum(dim=(1, 2))
    else:
        value = (a.features.mT @ b.features).square().sum(dim=(1, 2))
    return torch.where(a.defined & b.defined, value, float("nan"))


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA between ``[B, T, D]`` and ``[B, T, E]`` for each sample: ``[B]``, in [0, 1], NaN where
    undefined."""
    return cka(represent(x), represent(y))


def directional_gap(x: Tensor, y: Tensor) -> Tensor:
    """Mean over tokens of ``||Norm(x) - Norm(y)||^2``, Norm along channels (Eq. 6): ``[B, T, D]`` twice to
    ``[B]``."""
    normalize = torch.nn.functional.normalize
    return (normalize(x.float(), dim=-1) - normalize(y.float(), dim=-1)).square().sum(dim=-1).mean(dim=-1)


class Average:
    """Running means of the entries of a matrix, over the samples that define them."""

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64)
        self._count = torch.zeros(size, size, dtype=torch.int64)

    def add(self, row: int, column: int, values: Tensor) -> None:
        """Add one value for each sample; NaN counts for nothing."""
        known = values[~values.isnan()].double()
        self._sum[row, column] += known.sum().cpu()
        self._count[row, column] += len(known)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Sums and counts, the ones in use: what is written to them counts."""
        return self._sum, self._count

    def matrix(self) -> Matrix:
        """The means; None where nothing was added."""
        means = (self._sum / self._count.clamp(min=1)).tolist()
        return [
            [value if count else None for value, count in zip(row, counts, strict=True)]
            for row, counts in zip(means, self._count.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Curves:
    """Matrices of one stream: ``cka(u, k)`` (Eq. 3), the directional gap of the same surrogates, the
    teacher's heatmap."""

    cka: Matrix
    gap: Matrix
    similarity: Matrix


class CurveSums:
    """The curves of one stream of one stack while samples come in.

    Each surrogate is built on the one before it, so a batch costs one probe product for each pair u < k.
    """

    def __init__(self, size: int) -> None:
        self.surrogate, self.gap, self.heat = Average(size), Average(size), Average(size)

    def add(
        self, outputs: Sequence[Tensor], probes: Sequence[Projector], tick: Callable[[int], None] = lambda pairs: None
    ) -> None:
        """Add a batch of samples: one tensor ``[B, T, D]`` for each block's output, and each block's probe.

        `tick` is told, block after block, how many pairs u < k were done.
        """
        size = len(probes)
        assert len(outputs) == size, "one output for each block"
        teacher = [represent(output) for output in outputs]
        for u in range(size):
            one = torch.where(teacher[u].defined, 1.0, float("nan"))
            self.surrogate.add(u, u, one)
            self.heat.add(u, u, one)
            self.gap.add(u, u, torch.zeros(len(outputs[u])))
            x = outputs[u].float()
            for k in range(u + 1, size):
                with products_of(outputs[k].dtype, x.device):
                    # The teacher's own states are rounded as coarsely.
                    x = probes[k](x)
                self.surrogate.add(u, k, cka(teacher[u], represent(x)))
                self.gap.add(u, k, directional_gap(x, outputs[k]))
                alike = cka(teacher[u], teacher[k])
                self.heat.add(u, k, alike)
                self.heat.add(k, u, alike)
            tick(size - 1 - u)

    def curves(self) -> Curves:
        """The means over all samples so far."""
        return Curves(self.surrogate.matrix(), self.gap.matrix(), self.heat.matrix())


def curves(samples: Iterator[list[Tensor]], probes: Sequence[Projector]) -> Curves:
    """Curves of one stream of one stack, averaged over samples.

    `samples` yields batches: one tensor ``[B, T, D]`` for each block's output.
    """
    sums = CurveSums(len(probes))
    for outputs in samples:
        sums.add(outputs, probes)
    return sums.curves()


@dataclass(frozen=True)
class Similarity(Pass):
    """Compute the CKA curves of every stack and stream, and write row u to block u's output node.

    Annotates ``node.meta["ppcl"]`` with ``cka``, ``delta``, ``gap`` and ``similarity``: lists over the
    stack's blocks (`ppcl_fx.redundancy.StreamCurves` says what they hold).
    """

    measured: Measurement
    ridge: float = 1e-6
    refine_steps: int = 0

    name: ClassVar[str] = "similarity"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"

    def requires(self, gm: GraphModule) -> None:
        """Raises `PpclError` if the measurements are of another graph."""
        self.measured.require(gm)

    def apply(self, gm: GraphModule) -> Result:
        from ppcl_fx.passes.intervals import first_difference

        for site in self.measured.streams:
            found = self.measured.curves(site, self.ridge, self.refine_steps)
            delta = first_difference(found.cka)
            for u, node in enumerate(site.outputs):
                rows = {
                    "cka": found.cka[u],
                    "delta": delta[u],
                    "gap": found.gap[u],
                    "similarity": found.similarity[u],
                }
                node.meta.setdefault("ppcl", {}).update(rows)
        return Result(gm, modified=False)
