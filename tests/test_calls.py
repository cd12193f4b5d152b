"""Calls: the round trip through a folder, its damage found at once, and several calls joined to one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppcl_fx.calls.store import Call, Calls, collate, map_tensors
from ppcl_fx.errors import PpclError
from ppcl_fx.io.fingerprint import fingerprint, tensor_digest


def call(index: int = 0, batch: int = 2, prompts: tuple[str, ...] = ("a", "b"), **kwargs: Any) -> Call:
    generator = torch.Generator().manual_seed(index)
    default = {
        "hidden_states": torch.randn(batch, 4, 3, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 2, 2)]] * batch,
        "ids": torch.arange(12.0).reshape(4, 3),
        "return_dict": False,
    }
    return Call({**default, **kwargs}, prompts, 0.5, index, batch)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


NESTED = {
    "floats": [0.1, 1.0, 1e300],
    "numbers": (1, True, None, "x"),
    "empty": [(), [], {}],
    "dict": {"b": {"deep": [torch.ones(2, dtype=torch.bfloat16), ({"t": torch.zeros(())},)]}, "a": -3},
    "bools": torch.tensor([True, False]),
    "ints": torch.arange(3),
    "nothing": torch.empty(0, 4),
    "strided": torch.arange(6.0).reshape(2, 3).t(),
    "complex": torch.ones(2, dtype=torch.complex64) * 1j,
    "eight": torch.ones(3).to(torch.float8_e4m3fn),
}


def test_values_and_types_survive_the_round_trip(tmp_path: Path) -> None:
    calls = Calls([call(0, **NESTED), call(1)], model="m")
    calls.save(tmp_path / "calls")
    opened = Calls.open(tmp_path / "calls")
    assert len(opened) == 2 and opened.model == "m"
    for before, after in zip(calls, opened, strict=True):
        kwargs = {k: v.float() if k == "eight" else v for k, v in before.kwargs.items()}
        again = {k: v.float() if k == "eight" else v for k, v in after.kwargs.items()}
        assert same(kwargs, again)
        assert (after.prompts, after.timestep, after.index, after.batch) == (("a", "b"), 0.5, before.index, 2)
    assert opened.examples().keys() == calls[0].kwargs.keys()


def test_equal_tensors_are_stored_once_and_shards_are_bounded(tmp_path: Path) -> None:
    text = torch.ones(1000)
    calls = Calls([call(i, text=text.clone(), own=torch.full((1000,), i + 2.0)) for i in range(5)])
    calls.save(tmp_path / "calls", shard_bytes=9000)
    shards = sorted((tmp_path / "calls").glob("*.safetensors"))
    names = [name for shard in shards for name in load_file(shard)]
    assert len(shards) == 3 and all(shard.stat().st_size < 10_000 for shard in shards)
    assert sum(name.endswith(".text") for name in names) == 1
    assert sum(name.endswith(".own") for name in names) == 5
    opened = Calls.open(tmp_path / "calls")
    assert all(same(a.kwargs, b.kwargs) for a, b in zip(calls, opened, strict=True))


def test_folders_from_before_outputs_are_read_as_they_were(tmp_path: Path) -> None:
    calls = Calls([call(), call(1)], model="m")
    calls.save(tmp_path / "calls")
    index = tmp_path / "calls" / "index.json"
    plain = json.loads(index.read_text(encoding="utf-8"))
    assert [entry.pop("output") for entry in plain["calls"]] == [None, None]
    index.write_text(json.dumps(plain), encoding="utf-8")
    opened = Calls.open(tmp_path / "calls")
    assert opened.fingerprint == calls.fingerprint
    assert [c.output for c in opened] == [None, None]
    # What the fingerprint of these calls was before outputs could be recorded.
    assert calls.fingerprint == "082950b80e7afaf4ec32f7f892ecb5240ad183c441535683c990d7e814b29d1c"


def test_outputs_are_checked_like_arguments(tmp_path: Path) -> None:
    plain, answered = call(), replace(call(), output=torch.randn(2, 4, 3))
    one, two = Calls([plain], model="m"), Calls([answered], model="m")
    assert one.fingerprint != two.fingerprint
    two.save(tmp_path / "calls")
    opened = Calls.open(tmp_path / "calls")
    assert opened.fingerprint == two.fingerprint
    assert opened[0].output is not None
    assert answered.output is not None
    assert torch.equal(opened[0].output, answered.output)
    shard = next((tmp_path / "calls").glob("*.safetensors"))
    tensors = {name: value.clone() for name, value in load_file(shard).items()}
    tensors["0.(output)"] += 1
    save_file(tensors, shard)
    with pytest.raises(PpclError, match=r"call 0: '\(output\)' is not what was recorded"):
        Calls.open(tmp_path / "calls")
    answered.output[0, 0, 0] = float("nan")
    with pytest.raises(PpclError, match=r"call 0: '\(output\)' holds NaN"):
        Calls([answered]).save(tmp_path / "bad")


def test_fingerprint_tells_calls_apart(tmp_path: Path) -> None:
    base = Calls([call()], model="m")
    nudged = call()
    nudged.kwargs["hidden_states"].view(-1)[5] += 1e-6
    others = [
        Calls([call()], model="n"),
        Calls([call(prompts=("a", "c"))], model="m"),
        Calls([nudged], model="m"),
        Calls([call(return_dict=True)], model="m"),
        Calls([call(img_shapes=[[[1, 2, 2]]] * 2)], model="m"),
        Calls([call(), call(1)], model="m"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert Calls([call()], model="m").fingerprint == base.fingerprint
    base.save(tmp_path / "a", shard_bytes=1)
    base.save(tmp_path / "b")
    assert (
        Calls.open(tmp_path / "a").fingerprint == Calls.open(tmp_path / "b").fingerprint == base.fingerprint
    )


def test_slices_are_calls(tmp_path: Path) -> None:
    Calls([call(i) for i in range(4)], model="m").save(tmp_path / "calls")
    part = Calls.open(tmp_path / "calls")[1:3]
    assert isinstance(part, Calls) and part.model == "m" and [c.index for c in part] == [1, 2]
    part.save(tmp_path / "part")
    assert [c.index for c in Calls.open(tmp_path / "part")] == [1, 2]


def test_nothing_to_save_or_to_take_from(tmp_path: Path) -> None:
    with pytest.raises(PpclError, match="no calls"):
        Calls([]).save(tmp_path / "calls")
    with pytest.raises(PpclError, match="no calls"):
        Calls([]).examples()
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_saved(tmp_path: Path) -> None:
    bad = call(3, extra={"x": [torch.tensor([1.0, float("inf")])]})
    with pytest.raises(PpclError, match=r"call 3: 'extra\.x\.0' holds NaN or infinity"):
        Calls([call(), bad]).save(tmp_path / "calls")
    with pytest.raises(PpclError, match=r"argument 'scale' is nan"):
        Calls([call(scale=float("nan"))]).save(tmp_path / "calls")
    with pytest.raises(PpclError, match=r"argument 'f\.0' is a function"):
        Calls([call(f=[same])]).save(tmp_path / "calls")
    with pytest.raises(PpclError, match=r"argument 'd' is a dict whose keys are not all strings"):
        Calls([call(d={1: 2})]).save(tmp_path / "calls")
    assert list(tmp_path.iterdir()) == []


def test_saving_twice_needs_to_be_told(tmp_path: Path) -> None:
    Calls([call()]).save(tmp_path / "calls")
    with pytest.raises(PpclError, match="already exists"):
        Calls([call(1)]).save(tmp_path / "calls")
    Calls([call(1)]).save(tmp_path / "calls", overwrite=True)
    assert Calls.open(tmp_path / "calls")[0].index == 1


LAST = "calls-00001.safetensors"


def truncate(folder: Path) -> None:
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-8])


def change(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {n: t.clone() for n, t in load_file(folder / LAST).items()}
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        save_file(tensors, folder / LAST)

    return edit


def edit_index(edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        edit(index)
        (folder / "index.json").write_text(json.dumps(index))

    return apply


def ref(index: Any) -> Any:
    return index["calls"][1]["kwargs"]["hidden_states"]


NAN = torch.full((2, 4, 3), float("nan"))
DAMAGE = {
    "truncated": (truncate, rf"{LAST}: call 1: truncated .*record the calls again"),
    "missing": (lambda f: (f / LAST).unlink(), rf"{LAST}: no such file, and call 1 is in it"),
    "tensor gone": (change("1.hidden_states", None), rf"{LAST}: call 1: holds no tensor '1.hidden_states'"),
    "nan": (change("1.hidden_states", NAN), rf"{LAST}: call 1: 'hidden_states' holds NaN or infinity"),
    "other values": (
        change("1.hidden_states", torch.ones(2, 4, 3)),
        rf"{LAST}: call 1: .*not what was recorded",
    ),
    "other shape": (
        change("1.hidden_states", torch.ones(2, 5, 3)),
        rf"{LAST}: call 1: '1.hidden_states' is \[2, 5, 3\] here and \[2, 4, 3\] in index.json",
    ),
    "index shape": (
        edit_index(lambda i: ref(i).update(shape=[2, 4])),
        rf"{LAST}: call 1: .*\[2, 4\] in index",
    ),
    "path": (edit_index(lambda i: ref(i).update(shard="../x.safetensors")), "leaves its folder"),
    "prompt": (edit_index(lambda i: i["calls"][0].update(prompts=["z"])), "index.json: was changed"),
    "version": (edit_index(lambda i: i.update(version=2)), "index.json: version: input should be 1"),
    "unknown": (edit_index(lambda i: i["calls"][0].update(promts=[])), "did you mean 'prompts'"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_with_file_and_call(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "calls"
    Calls([call(0), call(1)]).save(folder, shard_bytes=200)
    assert Calls.open(folder).fingerprint
    apply, reason = DAMAGE[damage]
    apply(folder)
    with pytest.raises(PpclError, match=reason) as caught:
        Calls.open(folder)
    assert "\n" not in str(caught.value)


def test_without_the_check_values_are_not_read(tmp_path: Path) -> None:
    Calls([call(0), call(1)]).save(tmp_path / "calls", shard_bytes=200)
    change("1.hidden_states", NAN)(tmp_path / "calls")
    assert len(Calls.open(tmp_path / "calls", check=False)) == 2


def test_collate_joins_along_the_batch() -> None:
    extra = {"scale": 2.0, "maps": (torch.ones(2, 1), torch.zeros(2, 1))}
    a, b = (
        call(0, blocks=[torch.ones(2, 3)] * 2, extra=extra),
        call(1, blocks=[torch.zeros(2, 3)] * 2, extra=extra),
    )
    joined = collate([a, b])
    assert torch.equal(
        joined["hidden_states"], torch.cat([a.kwargs["hidden_states"], b.kwargs["hidden_states"]])
    )
    assert joined["timestep"].shape == (4,) and joined["img_shapes"] == [[(1, 2, 2)]] * 4
    assert torch.equal(joined["ids"], a.kwargs["ids"]) and joined["return_dict"] is False
    assert [tuple(t.shape) for t in joined["blocks"]] == [(4, 3)] * 2
    assert isinstance(joined["extra"]["maps"], tuple) and joined["extra"]["maps"][1].shape == (4, 1)


def test_collate_of_unequal_batches_and_of_one_call() -> None:
    joined = collate([call(0), call(1, batch=1), call(2, batch=3)])
    assert joined["hidden_states"].shape == (6, 4, 3) and len(joined["img_shapes"]) == 6
    one = call()
    assert same(collate([one]), one.kwargs)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            call(1, hidden_states=torch.ones(2, 5, 3)),
            r"calls 0, 1 .*'hidden_states' has the shapes \[2, 4, 3\], \[2, 5",
        ),
        (call(1, ids=torch.zeros(4, 3)), r"'ids' is not batched and has several values"),
        (call(1, return_dict=True), r"'return_dict' has several values"),
        (call(1, timestep=0.5), r"'timestep' is of several types"),
        (call(1, more=1), r"call 0 has no argument 'more'"),
        (call(1, img_shapes=[[(1, 2, 2)]] * 3), r"'img_shapes' has several lengths"),
    ],
)
def test_collate_refuses_what_does_not_fit(other: Call, reason: str) -> None:
    with pytest.raises(PpclError, match=reason):
        collate([call(0), other])
    with pytest.raises(PpclError, match="no calls"):
        collate([])


def test_collate_does_not_guess() -> None:
    with pytest.raises(PpclError, match=r"'ids' is \[4, 3\], one row a sample or one a token"):
        collate([call(0, batch=4), call(1, batch=4)])


def test_map_tensors_names_the_paths() -> None:
    paths: list[str] = []
    map_tensors({"a": [torch.ones(1), {"b": (torch.ones(1),)}]}, lambda path, tensor: paths.append(path))
    assert paths == ["a.0", "a.1.b.0"]


def build(width: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 200), nn.LayerNorm(200))


def test_model_fingerprint() -> None:
    model = build()
    others = [
        build(width=4),
        build(seed=1),
        build().to(torch.bfloat16),
        build().to("meta"),
        nn.ModuleList(build()),
    ]
    assert len({fingerprint(m) for m in [model, *others]}) == 6
    assert fingerprint(build()) == fingerprint(model) == fingerprint(model.eval())
    with torch.no_grad():
        model[0].weight[-1, -1] += 1e-6
    assert fingerprint(build()) != fingerprint(model)


def test_tensor_digest_covers_dtype_and_shape() -> None:
    ones = torch.ones(4)
    assert tensor_digest(ones) == tensor_digest(ones.clone()) == tensor_digest(torch.ones(8)[::2])
    assert len({tensor_digest(t) for t in (ones, ones.reshape(2, 2), ones.view(torch.int32), ones * 2)}) == 4


def test_calls_of_one_number_and_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    """Two recordings joined have two calls of each number; a name may look like a path."""
    alike = {"d": {"x": torch.ones(2)}, "d.x": torch.zeros(2)}
    calls = Calls([call(0, **alike), replace(call(1), index=0), replace(call(2), index=-3)], model="m")
    calls.save(tmp_path / "calls")
    opened = Calls.open(tmp_path / "calls")
    assert [one.index for one in opened] == [0, 0, -3] and opened.fingerprint == calls.fingerprint
    for one, again in zip(calls, opened, strict=True):
        assert same(one.kwargs, again.kwargs)
