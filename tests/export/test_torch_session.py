"""Weights of an exported file in PyTorch: what ratios share on a device, buffers, and files that say what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.export.runtime.folder import Artefact
from ppcl_fx.export.runtime.sessions import TORCH, SessionChoice
from ppcl_fx.export.runtime.torch_session import _fill, _placed, _weights
from ppcl_fx.export.store.manifest import Manifest
from tests.export.test_tensorrt import write_graph

META = torch.device("meta")
"""A device that is not the CPU: what is placed there is another tensor."""


def test_memory_that_is_used_again_is_not_taken_for_the_weight_that_was_there() -> None:
    memory, shared = bytearray(64), dict[Any, torch.Tensor]()
    first = _placed(torch.frombuffer(memory, dtype=torch.float32), META, shared)
    # The next ratio's tensor lies where that of the first lay, of the same shape and type.
    assert _placed(torch.frombuffer(memory, dtype=torch.float32), META, shared) is not first
    assert shared == {}


def test_a_part_of_a_mapped_file_goes_to_a_device_once(tmp_path: Path) -> None:
    graph, shared = write_graph(tmp_path / "keep-0.7.onnx"), dict[Any, torch.Tensor]()

    def placed(rows: slice = slice(None)) -> torch.Tensor:
        return _placed(dict(_weights(graph, shared))["w"][rows], META, shared)

    assert placed() is placed()
    assert placed(slice(2)) is not placed()
    assert placed(slice(2)) is placed(slice(2))
    assert placed(slice(0, 2)) is not placed(slice(2, 4))
    other = write_graph(tmp_path / "keep-0.5.onnx")
    assert _placed(dict(_weights(other, shared))["w"], META, shared) is not placed()


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def filled(tmp_path: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    graph = torch.fx.symbolic_trace(_Table())
    artefact = Artefact(tmp_path / "keep-0.7.onnx", Manifest.model_construct())
    _fill(graph, weights, SessionChoice(TORCH, artefact, torch.device("cpu")), {})
    result = graph(torch.zeros(4))
    assert isinstance(result, torch.Tensor)
    return result


def test_buffers_are_those_of_the_file(tmp_path: Path) -> None:
    assert torch.equal(filled(tmp_path, {"table": torch.arange(4.0)}), torch.arange(4.0))
    assert torch.equal(filled(tmp_path, {}), torch.zeros(4))
    with pytest.raises(PpclError, match=r"table is torch.float32 \[5\] there and torch.float32 \[4\] in the model"):
        filled(tmp_path, {"table": torch.zeros(5)})
    with pytest.raises(PpclError, match=r"table is torch.int64 \[4\] there and torch.float32 \[4\] in the model"):
        filled(tmp_path, {"table": torch.zeros(4, dtype=torch.int64)})
    assert filled(tmp_path, {"table": torch.ones(4, dtype=torch.float64)}).sum() == 4


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("length", "60", "w is 64 bytes long, and 60 bytes from 0 on in keep-0.7.bin are said to be it"),
        ("length", "0", "w is 64 bytes long, and 0 bytes from 0 on"),
        ("offset", "-4", "not an ONNX file"),
        ("offset", "64", "is shorter than keep-0.7.onnx says"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(tmp_path: Path, key: str, value: str, words: str) -> None:
    graph = write_graph(tmp_path / "keep-0.7.onnx")
    model = onnx.load(graph, load_external_data=False)
    places = model.graph.initializer[0].external_data
    told = {entry.key: entry.value for entry in places} | {"offset": "0", "length": "64"} | {key: value}
    del places[:]
    for name, text in told.items():
        places.add(key=name, value=text)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(PpclError, match=words) as caught:
        dict(_weights(graph, {}))
    assert "\n" not in str(caught.value)
