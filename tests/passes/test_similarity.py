"""CKA against its definition by HSIC, and the surrogate curves against a direct evaluation of Eq. 3."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppcl_fx.passes.analysis import curves as curve_sums
from ppcl_fx.passes.analysis import similarity
from ppcl_fx.passes.analysis.curves import CurveSums
from ppcl_fx.passes.analysis.probes import Projector
from ppcl_fx.passes.analysis.similarity import Average, Features, Kernels, directional_gap, linear_cka


def _hsic_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA as its authors define it: HSIC of centred Gram matrices, in float64."""
    tokens = len(x)
    centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ centre @ b @ centre) / (tokens - 1) ** 2

    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def _pair(tokens: int, width: int, other: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, width, generator=generator) + 2.0
    y = torch.randn(3, tokens, other, generator=generator) + x[..., :other] * 0.8
    return x, y


@pytest.mark.parametrize(("tokens", "width", "other"), [(40, 8, 8), (6, 20, 20), (10, 12, 7), (12, 12, 5)])
def test_both_forms_give_the_hsic_number_for_each_sample(tokens: int, width: int, other: int) -> None:
    x, y = _pair(tokens, width, other)
    expected = [_hsic_cka(a, b) for a, b in zip(x, y, strict=True)]
    assert linear_cka(x, y).tolist() == pytest.approx(expected, abs=1e-5)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x, _ = _pair(30, 9, 9)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(linear_cka(x, 1e4 * (x @ rotation) - 5), torch.ones(3), atol=1e-4, rtol=0)


def test_equal_tokens_have_no_cka() -> None:
    x, y = _pair(6, 9, 9)
    x[1] = x[1, :1]
    value = linear_cka(x, y)
    assert value.isnan().tolist() == [False, True, False]
    assert linear_cka(x[:, :1], y[:, :1]).isnan().all()


def test_average_leaves_undefined_samples_out() -> None:
    average = Average(2)
    average.add(0, 1, torch.tensor([0.5, float("nan"), 1.0]))
    average.add(0, 1, torch.tensor([0.0]))
    average.add(1, 0, torch.tensor([float("nan")]))
    assert average.matrix() == [[None, 0.5], [None, None]]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(5, 8), (12, 8), (20, 8)])
def test_curves_are_equation_3_for_every_pair(
    tokens: int, width: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # every loop takes several rounds
        monkeypatch.setattr(similarity, "TILE", 5)
        monkeypatch.setattr(similarity, "SUMMED", 7)
        monkeypatch.setattr(curve_sums, "CHUNK_BYTES", 2 * 3 * tokens * width * 4)
        monkeypatch.setattr(curve_sums, "CACHED_BYTES", 1)
        monkeypatch.setattr(curve_sums, "ROWS", 3)
        monkeypatch.setattr(similarity, "TOKENS", 4)
    generator = torch.Generator().manual_seed(3)
    blocks = 4
    probes = [Projector(0.2 * torch.randn(width, width, generator=generator)) for _ in range(blocks)]
    batches = [[torch.randn(b, tokens, width, generator=generator) for _ in range(blocks)] for b in (2, 3)]
    sums = CurveSums(len(probes))
    for batch in batches:
        sums.add(batch, probes)
    found = sums.curves()
    for u in range(blocks):
        assert found.cka[u][u] == 1.0
        assert found.gap[u][u] == 0.0
        assert found.cka[u][:u] == [None] * u
        for k in range(u + 1, blocks):
            expected, gaps, heat = [], [], []
            for outputs in batches:
                for sample in range(len(outputs[u])):
                    x = outputs[u][sample]
                    for probe in probes[u + 1 : k + 1]:
                        x = x + x @ probe.weight.T
                    expected.append(_hsic_cka(outputs[u][sample], x))
                    heat.append(_hsic_cka(outputs[u][sample], outputs[k][sample]))
                    gaps.append(float(directional_gap(x[None], outputs[k][sample][None])))
            assert found.cka[u][k] == pytest.approx(sum(expected) / 5, abs=1e-5)
            assert found.similarity[u][k] == pytest.approx(sum(heat) / 5, abs=1e-5)
            assert found.similarity[k][u] == found.similarity[u][k]
            assert found.gap[u][k] == pytest.approx(sum(gaps) / 5, rel=1e-5)


def test_gap_is_the_squared_distance_of_directions() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    y = torch.tensor([[[3.0, 0.0], [5.0, 0.0]]])
    assert directional_gap(x, y).tolist() == [1.0]  # 0 for the first token, 2 for the second


@pytest.mark.parametrize("tile", [3, 512])
def test_both_ways_to_compare_agree(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE", tile)
    generator = torch.Generator().manual_seed(4)
    states = [torch.randn(2, 10, 8, generator=generator) + 1.0 for _ in range(4)]
    states[2][1] = states[2][1, :1]  # a sample whose tokens are all alike
    others = torch.randn(2, 2, 10, 8, generator=generator)
    others[1, 0] = 0.0
    for kind in (Kernels, Features):
        found = kind(states)
        heat = found.heat()
        for u in range(4):
            for k in range(4):
                expected = linear_cka(states[u], states[k])
                torch.testing.assert_close(heat[:, u, k].float(), expected, atol=1e-6, rtol=0, equal_nan=True)
        found.choose(1, 4)
        values = found.against(1, others)
        expected = torch.stack([linear_cka(states[2], others[0]), linear_cka(states[3], others[1])])
        torch.testing.assert_close(values.float(), expected, atol=1e-6, rtol=0, equal_nan=True)
        assert values.isnan().tolist() == [[False, True], [True, False]]
