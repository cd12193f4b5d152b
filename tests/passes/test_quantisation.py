"""Weights in few bits: how they are packed, how they are rounded, and which layers take it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.executor import Residency
from ppcl_fx.passes.quantisation.gptq import output_error, rounded
from ppcl_fx.passes.quantisation.layers import layer_inputs, linear_layers
from ppcl_fx.passes.quantisation.linear import QuantisedLinear, with_quantised
from ppcl_fx.passes.quantisation.quantise import quantise, within_error
from ppcl_fx.passes.quantisation.schemes import QuantisedWeight, Scheme
from ppcl_fx.tracing import trace
from tests import models

SCHEMES = [Scheme("int8"), Scheme("int8", 32), Scheme("int4", 32), Scheme("int4", 16), Scheme("fp8")]


def some(rows: int = 24, columns: int = 64, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs whose channels hang together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(tokens, columns // 4, generator=generator) @ mixed
    return weight, inputs + 0.1 * torch.randn(tokens, columns, generator=generator)


def test_int4_is_packed_as_onnx_packs_it() -> None:
    scheme = Scheme("int4", 4)
    weight = QuantisedWeight(scheme, torch.tensor([[-7, 3, 0, 7]], dtype=torch.int8), torch.ones(1, 1))
    assert weight.packed().tolist() == [[0x39, 0x70]]  # the first in the low half, in two's complement
    assert torch.equal(QuantisedWeight.unpacked(scheme, weight.packed(), weight.scales).values, weight.values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_loses_nothing(scheme: Scheme) -> None:
    weight, inputs = some()
    made = rounded(weight, scheme, inputs.T @ inputs)
    again = QuantisedWeight.unpacked(scheme, made.packed(), made.scales)
    assert torch.equal(again.dequantised(), made.dequantised())
    forms = [(part.dtype, tuple(part.shape)) for part in (made.packed(), made.scales)]
    assert forms == list(scheme.forms(tuple(weight.shape)))
    parts = QuantisedWeight.joined([again.rows(0, 5), again.rows(5, 19)])
    assert torch.equal(parts.dequantised(), made.dequantised())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_for_the_inputs_beats_rounding_to_the_nearest(scheme: Scheme) -> None:
    weight, inputs = some()
    gram = inputs.T @ inputs
    ours, nearest = (output_error(weight, rounded(weight, scheme, g), gram) for g in (gram, None))
    assert 0 < ours < 0.7 * nearest
    seen = (inputs @ (rounded(weight, scheme, gram).dequantised() - weight).T).norm() / (inputs @ weight.T).norm()
    assert ours == pytest.approx(float(seen), rel=1e-3)


def test_scales_are_of_the_type_that_the_layer_computes_in() -> None:
    weight, inputs = some()
    made = rounded(weight, Scheme("int4", 32, torch.bfloat16), inputs.T @ inputs)
    assert torch.equal(made.scales.to(torch.bfloat16).float(), made.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_and_inputs_of_zero_stay_zero(scheme: Scheme) -> None:
    made = rounded(torch.zeros(3, 64), scheme, torch.zeros(64, 64))
    assert made.dequantised().count_nonzero() == 0 and bool(made.scales.isfinite().all())
    assert output_error(torch.zeros(3, 64), made, torch.zeros(64, 64)) == 0.0


def test_values_and_scales_of_different_weights_are_refused() -> None:
    packed = torch.zeros(4, 16, dtype=torch.uint8)
    for scales in (torch.ones(3, 1), torch.ones(4, 3), torch.ones(4)):
        with pytest.raises(PpclError, match="these are not of the same weights; export them again"):
            QuantisedWeight.unpacked(Scheme("int4", 32), packed, scales)


def test_layers_that_read_the_same_values_share_their_sums() -> None:
    teacher, kwargs = models.tiny_sd3()
    gm = trace(teacher, kwargs)
    groups = list(layer_inputs(gm, [kwargs, kwargs], Residency.of(gm)))
    names = [name for group in groups for name in group.layers]
    assert sorted(names) == sorted(set(names)) and set(names) <= linear_layers(gm).keys()
    together = next(group.layers for group in groups if "transformer_blocks.3.attn.to_q" in group.layers)
    assert {f"transformer_blocks.3.attn.to_{one}" for one in "qkv"} <= set(together)
    captured: list[torch.Tensor] = []
    layer = teacher.get_submodule("transformer_blocks.3.attn.to_q")
    handle = layer.register_forward_pre_hook(lambda module, args: captured.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        teacher(**kwargs)
    handle.remove()
    gram = next(group for group in groups if "transformer_blocks.3.attn.to_q" in group.layers)
    assert gram.tokens == 2 * len(captured[0]) and gram.largest == float(captured[0].abs().max())
    assert torch.allclose(gram.gram, 2 * captured[0].T @ captured[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [models.tiny_qwen, models.tiny_flux, models.tiny_sd3])
def test_a_graph_over_quantised_layers_is_that_of_dequantised_weights(build: object) -> None:
    teacher, kwargs = build()  # type: ignore[operator]
    gm = trace(teacher, kwargs)
    before = {name: parameter.clone() for name, parameter in gm.named_parameters()}
    found = quantise(gm, [kwargs], Scheme("int8"))
    # What nothing reads is not run: the last block's text, in two of these models.
    assert set(found.kept.values()) <= {"no recorded call runs it"}
    assert found.errors.keys() | found.kept.keys() == {f"{path}.weight" for path in linear_layers(gm)}
    made = with_quantised(gm, {name.removesuffix(".weight"): found[name] for name in found.errors})
    layers = [module for module in made.modules() if isinstance(module, QuantisedLinear)]
    assert len(layers) == len(found.errors) and not any(isinstance(m, QuantisedLinear) for m in gm.modules())
    call = {str(node.target): kwargs[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")}
    with torch.no_grad():
        exact, few = gm(**call)[0], made(**call)[0]
        for name in found.errors:
            gm.get_parameter(name).copy_(found[name].dequantised())
        torch.testing.assert_close(gm(**call)[0], few, rtol=1e-5, atol=1e-5)
    assert 0 < float((few - exact).norm() / exact.norm()) < 0.05
    assert all(torch.equal(before[name], p) for name, p in gm.named_parameters() if name not in found.errors)


def test_layers_that_blocks_do_not_fit_stay(tmp_path: Path) -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)  # texts have 24 channels
    gm = trace(teacher, kwargs)
    found = quantise(gm, [kwargs], Scheme("int4", 16))
    assert found.kept["txt_in.weight"] == "its 24 columns are no whole number of blocks"
    assert "txt_in.weight" not in found and "img_in.weight" in found
    shelved = quantise(gm, [kwargs], Scheme("int4", 16), folder=tmp_path / "shelf")
    assert shelved.errors == found.errors
    assert all(torch.equal(found[name].dequantised(), shelved[name].dequantised()) for name in found.errors)
    with pytest.raises(KeyError):
        found["txt_in.weight"]


def test_a_layer_that_computes_in_another_type_stays() -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)
    gm = trace(teacher, kwargs)
    gm.get_submodule("proj_out").double()
    gm.get_submodule("proj_out").register_forward_pre_hook(lambda module, args: (args[0].double(),))
    found = quantise(gm, [kwargs], Scheme("int8"))
    assert found.kept["proj_out.weight"] == "it computes in another type than the model, torch.float64"


def test_the_layers_that_lose_most_stay_where_the_error_has_a_limit() -> None:
    teacher, kwargs = models.tiny_qwen(blocks=1)
    found = quantise(trace(teacher, kwargs), [kwargs], Scheme("int8"))
    order = sorted(found.errors, key=lambda name: (found.errors[name], name))
    asked: list[int] = []

    def error(some: object) -> float:
        asked.append(len(some.errors))  # type: ignore[attr-defined]
        return asked[-1] / 100

    left = within_error(found, 0.05, error)
    assert list(left.errors) == [name for name in found.errors if name in order[:5]]
    assert left.kept.keys() - found.kept.keys() == set(order[5:]) and len(asked) <= 1 + len(order).bit_length()
    assert left.kept[order[-1]] == "with it the model's output would be off by more than 0.05"
    assert within_error(found, 1.0, error) is found and not within_error(found, 0.001, error).errors
    # What a layer does to the model's output goes before what it does to its own.
    measured = within_error(found, 0.05, error, lambda name: -found.errors[name])
    assert set(measured.errors) == set(order[-5:])
