"""The streamed normal equations against plain least squares."""

from __future__ import annotations

import math

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.passes.analysis import probes
from ppcl_fx.passes.analysis.probes import NormalEquations, Projector
from ppcl_fx.passes.calibration import normal_sums


def _data(
    samples: int = 300, width: int = 12, noise: float = 0.1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator)
    weight = torch.randn(width, width, generator=generator) / width
    y = x + x @ weight.T + 0.7 + noise * torch.randn(samples, width, generator=generator)
    return x, y


def _fed(x: torch.Tensor, y: torch.Tensor, bias: bool = False, chunks: int = 5) -> NormalEquations:
    sums = NormalEquations(bias=bias)
    for a, b in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        sums.add(a[None], b[None])
    return sums


@pytest.mark.parametrize("bias", [False, True])
def test_solution_is_the_least_squares_solution(bias: bool) -> None:
    x, y = _data()
    projector = _fed(x, y, bias).solve(ridge=1e-12)
    rows = torch.cat([x, torch.ones(len(x), 1)], dim=1) if bias else x
    expected = torch.linalg.lstsq(rows.double(), (y - x).double()).solution
    torch.testing.assert_close(projector.weight.double(), expected[: x.shape[1]].T, atol=1e-5, rtol=0)
    if bias:
        assert projector.bias is not None
        torch.testing.assert_close(projector.bias.double(), expected[-1], atol=1e-5, rtol=0)
    else:
        assert projector.bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_error_and_cosine_from_the_sums_are_those_of_the_data(bias: bool) -> None:
    x, y = _data(noise=0.5)
    sums = _fed(x, y, bias)
    projector = sums.solve()
    made = projector(x)
    error = (made - y).square().sum() / (y - x).square().sum()
    cosine = torch.nn.functional.cosine_similarity(made.flatten(), y.flatten(), dim=0)
    assert sums.error(projector) == pytest.approx(float(error), rel=1e-4)
    assert sums.cosine(projector) == pytest.approx(float(cosine), rel=1e-5)
    assert sums.samples == len(x)


def test_a_projector_of_zeros_has_error_one() -> None:
    x, y = _data()
    assert _fed(x, y).error(Projector(torch.zeros(12, 12))) == pytest.approx(1.0)


def test_fewer_tokens_than_channels_need_the_ridge() -> None:
    x, y = _data(samples=5)
    for ridge in (0.0, 1e-12, 1e-6):
        sums = _fed(x, y, chunks=1)
        assert sums.error(sums.solve(ridge)) < 1e-3


def test_tokens_of_low_rank_are_no_obstacle() -> None:
    """Text states of a small vocabulary: many tokens, few directions, one of them far larger than the
    rest."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(6, 40, generator=generator)
    words[0] *= 1000
    x = words[torch.randint(6, (5000,), generator=generator)]
    y = x + x @ torch.randn(40, 40, generator=generator) / 40
    sums = _fed(x, y)
    assert sums.error(sums.solve(1e-9)) < 1e-3


def test_zeros_are_refused() -> None:
    x, y = _data()
    with pytest.raises(PpclError, match="inputs are all zero"):
        _fed(0 * x, y).solve()


def test_gradient_steps_lower_the_error_that_the_ridge_left() -> None:
    x, y = _data()
    sums = _fed(x, y)
    errors = [sums.error(sums.solve(ridge=0.5, refine_steps=steps)) for steps in (0, 5, 50)]
    best = sums.error(sums.solve(ridge=1e-12))
    assert errors[0] > errors[1] > errors[2] >= best - 1e-9
    assert errors[2] == pytest.approx(best, rel=1e-3)


def test_a_block_that_changes_nothing_fits_perfectly() -> None:
    x, _ = _data()
    sums = _fed(x, x)
    assert sums.error(sums.solve()) == 0.0
    assert sums.cosine(sums.solve()) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused(bad: float) -> None:
    x, y = _data()
    y[3, 4] = bad
    with pytest.raises(PpclError, match="NaN or infinity"):
        _fed(x, y)


def test_bfloat16_activations_are_summed_in_full_precision() -> None:
    x, y = _data()
    x, y = x.bfloat16(), y.bfloat16()
    projector = _fed(x, y).solve(ridge=1e-12)
    expected = torch.linalg.lstsq(x.double(), y.double() - x.double()).solution.T
    torch.testing.assert_close(projector.weight.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_wide_sums_of_bfloat16_values_lose_nothing(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "WIDE", 8)
    x, y = (values.bfloat16() for values in _data(samples=400))
    sums = _fed(x, y, bias)
    projector = sums.solve(ridge=1e-6)
    rows = torch.cat([x, torch.ones(len(x), 1)], dim=1).double() if bias else x.double()
    residual = y.double() - x.double()
    expected = torch.linalg.lstsq(rows, residual).solution
    torch.testing.assert_close(projector.weight.double(), expected[: x.shape[1]].T, atol=1e-4, rtol=0)
    made = x.double() + rows @ expected
    assert sums.error(projector) == pytest.approx(
        float((made - y).square().sum() / residual.square().sum()), abs=1e-5
    )
    cosine = float((made * y).sum() / (made.norm() * y.double().norm()))
    assert sums.cosine(projector) == pytest.approx(cosine, abs=1e-6)
    # Measured once more, of a projector that is not the one solved last.
    again = Projector(projector.weight.clone(), projector.bias)
    assert sums.fit(again).error == pytest.approx(sums.fit(projector).error, abs=1e-6)
    assert sums.fit(again).cosine == pytest.approx(sums.fit(projector).cosine, abs=1e-6)


def test_products_are_as_precise_as_before_afterwards() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with normal_sums.products_of(torch.bfloat16, torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with normal_sums.products_of(torch.float32, torch.device("cpu")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_give_the_numbers_of_their_sums(bias: bool, dtype: torch.dtype) -> None:
    x, y = (values.to(dtype) for values in _data(samples=19, width=40, noise=0.5))
    few, many = _fed(x, y, bias), _fed(x, y, bias)
    many._flush()
    assert few._sums is None
    assert many._sums is not None
    for ridge in (1e-2, 1e-6):
        one, other = few.solve(ridge), many.solve(ridge)
        torch.testing.assert_close(one.weight, other.weight, atol=1e-7, rtol=1e-5)
        if bias:
            torch.testing.assert_close(one.bias, other.bias, atol=1e-7, rtol=1e-5)
        assert few.error(one) == pytest.approx(many.error(other), rel=1e-7, abs=1e-13)
        assert few.cosine(one) == pytest.approx(many.cosine(other), rel=1e-9)
        again = Projector(one.weight.clone(), one.bias)
        assert few.fit(again).error == pytest.approx(many.fit(again).error, rel=1e-9, abs=1e-13)
        assert few.fit(again).cosine == pytest.approx(few.cosine(one), rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [8, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_do_not_depend_on_how_they_are_cut(
    bias: bool, wide: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "WIDE", wide)
    x, y = (values.to(dtype) for values in _data(samples=200))
    whole = _fed(x, y, bias, chunks=1)
    for name, size in (("TILE", 5), ("PIECE", 37), ("ROWS", 7)):
        monkeypatch.setattr(normal_sums, name, size)
    cut = _fed(x, y, bias, chunks=61)  # four tokens at once: they are kept until there are seven
    tolerance = 1e-12 if wide > 12 else 1e-5
    for steps in (0, 2):
        one, other = whole.solve(1e-4, steps), cut.solve(1e-4, steps)
        torch.testing.assert_close(one.weight, other.weight, atol=1e-5 if wide == 8 else 1e-7, rtol=1e-5)
        assert cut.error(other) == pytest.approx(whole.error(one), rel=0, abs=tolerance)
        assert cut.cosine(other) == pytest.approx(whole.cosine(one), rel=0, abs=tolerance)
    # The sums are the definition's.
    rows = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double() if bias else x.double()
    assert cut._sums is not None
    torch.testing.assert_close(cut._sums._whole().double(), rows.T @ rows, atol=1e-3, rtol=1e-6)
    residual = y.double() - x.double()
    torch.testing.assert_close(cut._sums._residual_cross().double(), residual.T @ rows, atol=1e-3, rtol=1e-6)


def test_what_was_kept_does_not_change_with_its_source() -> None:
    x, y = _data(samples=4)
    sums, same = NormalEquations(), NormalEquations()
    same.add(x.clone(), y.clone())
    sums.add(x, y)
    x.zero_()
    y.zero_()
    assert torch.equal(sums.solve().weight, same.solve().weight)
