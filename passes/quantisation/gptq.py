"""Rounding a weight so that the error which its layer's output sees is least: GPTQ (Frantar and others, 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme

DAMP = 0.01
"""What is added to the diagonal of ``X^T X``, as a share of its mean."""
CHUNK = 128
"""Columns whose errors are carried to the columns behind them at once."""


def rounded(weight: Tensor, scheme: Scheme, gram: Tensor | None = None, inputs: float | None = None) -> QuantisedWeight:
    """Return a weight in few bits.

    Columns are rounded from the left, and each error is made up for by the columns that are still to come:
    ``w_j -= e_i U_ij / U_ii``, with U the upper Cholesky factor of ``(X^T X + damping)^-1``. Scales are chosen as a
    block is reached, from the weights as they are by then.

    Args:
        weight: ``[rows, columns]``.
        scheme: how to store it.
        gram: ``X^T X`` of the layer's inputs, ``[columns, columns]``; None to round each weight to the nearest.
        inputs: for `QuantisedWeight.inputs`.
    """
    rows, columns = weight.shape
    width = scheme.width(columns)
    left = weight.detach().to(torch.float32, copy=True)
    if gram is None:
        importance, upper = torch.ones(columns, device=left.device), None
    else:
        importance, upper = _factor(gram.to(left.device))
        left[:, gram.diagonal() == 0] = 0.0  # no input ever reaches these
    values = torch.empty_like(left)
    scales = torch.empty(rows, columns // width, device=left.device)
    chunk = min(width, CHUNK) if width % min(width, CHUNK) == 0 else width
    for begin in range(0, columns, chunk):
        stop = begin + chunk
        block = begin // width
        if begin % width == 0:
            until = begin + width
            scales[:, block] = scheme.scales(left[:, begin:until], importance[begin:until])
        scale = scales[:, block, None]
        if upper is None:
            values[:, begin:stop] = scheme.snap(left[:, begin:stop] / scale)
            continue
        part, errors = left[:, begin:stop].clone(), torch.empty(rows, chunk, device=left.device)
        own = upper[begin:stop, begin:stop]
        for i in range(chunk):
            column = part[:, i : i + 1]
            values[:, begin + i : begin + i + 1] = value = scheme.snap(column / scale)
            errors[:, i : i + 1] = error = (column - value * scale) / own[i, i]
            part[:, i + 1 :] -= error * own[i, i + 1 :]
        left[:, stop:] -= errors @ upper[begin:stop, stop:]
    return QuantisedWeight(scheme, values.to(scheme.stored), scales, inputs)


def _factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squares of the inputs, up to a factor, and the upper factor of the inverse."""
    regular = gram.to(torch.float64, copy=True)
    diagonal = regular.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    importance = (diagonal / diagonal.mean()).float()
    diagonal += DAMP * float(diagonal[~dead].mean() if bool((~dead).any()) else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    return importance, torch.linalg.cholesky(inverse, upper=True).float()


def output_error(weight: Tensor, stored: QuantisedWeight, gram: Tensor) -> float:
    """Return the relative error (root mean square) of a layer's output, a bias left out, on what `gram` sums.

    Args:
        weight: ``[rows, columns]``.
        stored: the weight in few bits.
        gram: ``X^T X``, ``[columns, columns]``.
    """
    exact, gram = weight.double(), gram.double()
    wrong = stored.dequantised(torch.float64) - exact
    whole = float(((exact @ gram) * exact).sum())
    return (max(0.0, float(((wrong @ gram) * wrong).sum())) / whole) ** 0.5 if whole > 0 else 0.0
