"""The cache: its budgets, its checksums, what a killed run finds again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppcl_fx.errors import PpclError
from ppcl_fx.train.bounded.cache import Cache, Damaged

CPU = torch.device("cpu")
VALUE = torch.arange(256, dtype=torch.float32)
SIZE = VALUE.nbytes


def made(folder: Path, memory: int = 0, disk: int = 2**20, key: str = "a") -> Cache:
    return Cache(folder / "cache", key, memory, disk, CPU)


def test_memory_comes_first_and_then_the_disk(tmp_path: Path) -> None:
    cache = made(tmp_path, memory=2 * SIZE)
    for call in range(3):
        cache.put(call, "000", (VALUE + call, call, None))
    assert cache.held_bytes == 2 * SIZE
    assert [path.parent.name for path in (tmp_path / "cache").rglob("*.safetensors")] == ["000002"]
    for call in range(3):
        tensor, number, nothing = cache.get(call, "000")
        assert torch.equal(tensor, VALUE + call) and (number, nothing) == (call, None)
    cache.keep_only([2])
    assert cache.held_bytes == 0 and not cache.has(0, "000") and cache.has(2, "000")
    cache.drop(2)
    assert cache.file_bytes == 0 and not cache.has(2, "000")


def test_a_full_disk_budget_is_told(tmp_path: Path) -> None:
    cache = made(tmp_path, disk=SIZE)
    cache.put(0, "000", (VALUE,))
    with pytest.raises(PpclError, match="give a larger --disk-limit"):
        cache.put(1, "000", (VALUE.clone(),))


def test_files_are_found_again_by_the_same_key_alone(tmp_path: Path) -> None:
    made(tmp_path).put(3, "001", (VALUE,))
    again = made(tmp_path)
    assert again.has(3, "001") and again.file_bytes > SIZE
    assert torch.equal(again.get(3, "001")[0], VALUE)
    assert not made(tmp_path, key="b").has(3, "001")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no checksum"])
def test_damage_is_found_at_reading(damage: str, tmp_path: Path) -> None:
    cache = made(tmp_path)
    cache.put(0, "000", (VALUE,))
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "cut":
        file.write_bytes(bytes(data[:-5]))
    elif damage == "gone":
        file.unlink()
    else:
        file.with_suffix(".json").unlink()
    with pytest.raises(Damaged):
        cache.get(0, "000")
