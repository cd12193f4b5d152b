"""Complex arithmetic in real numbers: equal to the bit, and refused where no real form is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from ppcl_fx.export import ComplexToReal
from ppcl_fx.passes.lowering.complex_to_real import complex_nodes


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rotation of Qwen-Image."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(table).unsqueeze(1)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def rotate_heads_first(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Heads before tokens, the product by operator and by method."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))).transpose(1, 2)
    freqs = torch.view_as_complex(table)[None, None]
    return torch.view_as_real(pairs.mul(freqs).conj().resolve_conj()).flatten(start_dim=-2)


def split_and_join(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Slices, concatenation, sums, differences, real factors and parts."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))).permute(0, 2, 1, 3)
    first, second = pairs[..., :4], pairs[:, :, :, 4:]
    joined = torch.cat([first + second, first - second], dim=-1)
    scaled = 2.0 * joined * joined.real + (3.0 - joined)
    return torch.view_as_real(scaled.unsqueeze(-1).squeeze(-1).reshape(scaled.shape[0], -1)) + scaled.imag.mean()


@pytest.mark.parametrize("function", [rotate, rotate_heads_first, split_and_join])
@pytest.mark.parametrize("tokens", [5, 64])
def test_equal_to_the_bit(function: Callable[..., torch.Tensor], tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(2, tokens, 3, 16, generator=generator), torch.randn(tokens, 8, 2, generator=generator)
    gm = symbolic_trace(function)
    expected = function(x, table)
    result = ComplexToReal()(gm)
    assert result.modified and not result.refused
    assert torch.equal(gm(x, table), expected)
    assert complex_nodes(gm) == set()
    longer = torch.randn(3, tokens + 3, 3, 16, generator=generator), torch.randn(tokens + 3, 8, 2, generator=generator)
    assert torch.equal(gm(*longer), function(*longer))


def test_second_run_changes_nothing() -> None:
    gm = symbolic_trace(rotate)
    assert ComplexToReal()(gm).modified
    before = gm.code
    assert not ComplexToReal()(gm).modified
    assert gm.code == before


def test_exported_graphs_too() -> None:
    class Rotate(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return rotate(x, table)

    x, table = torch.randn(2, 5, 3, 16), torch.randn(5, 8, 2)
    gm = torch.export.export(Rotate(), (x, table)).module()
    result = ComplexToReal()(gm)
    assert result.modified and not result.refused
    assert torch.equal(gm(x, table), rotate(x, table))


def test_constants_become_real() -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(5, 8), torch.arange(40.0).reshape(5, 8)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * self.turn)

    x, module = torch.randn(2, 5, 8, 2), Turn()
    gm = symbolic_trace(module)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = module.turn.to("meta")
    expected = module(x)
    assert ComplexToReal()(gm).modified
    assert torch.equal(gm(x), expected)


def test_unknown_operation_refuses_and_leaves_the_graph() -> None:
    def spectrum(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.fft.ifft(torch.view_as_complex(x)))

    gm = symbolic_trace(spectrum)
    before = gm.code
    result = ComplexToReal()(gm)
    assert not result.modified
    assert gm.code == before
    assert "no real form is known for fft_ifft of complex numbers" in result.refused[0].reason
    assert result.refused[0].nodes == ("fft_ifft",)


def test_complex_output_is_refused() -> None:
    gm = symbolic_trace(lambda x: torch.view_as_complex(x))
    result = ComplexToReal()(gm)
    assert not result.modified
    assert result.refused[0].nodes == ("output",)


def test_real_graph_stays() -> None:
    gm = symbolic_trace(lambda x: (x * 2).unsqueeze(-1))
    assert not ComplexToReal()(gm).modified
