"""The streamed rewrite: the folder that the unstreamed one saves, written tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ppcl_fx
from ppcl_fx.calls.store import Call, Calls
from ppcl_fx.errors import PpclError, Refusal
from ppcl_fx.io import files
from ppcl_fx.io.fingerprint import fingerprint
from ppcl_fx.io.shards import ONE_FILE, write_long
from ppcl_fx.model import rewrite as stream_rewrite
from ppcl_fx.model.paper_plans import NamedPlan
from ppcl_fx.model.pluggable import PLAN, STUDENTS, TEACHER
from ppcl_fx.model.rewrite import rewrite, rewrite_streamed
from ppcl_fx.model.sources import open_source
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models

pytestmark = pytest.mark.slow

STACK = "transformer_blocks"
PLANS = {
    "qwen": [
        DepthEdit(stack=STACK, first=0, last=1),
        DepthEdit(stack=STACK, first=3, last=4, init="middle"),
        TextStreamEdit(stack=STACK, source=2, last=5),
        FfnEdit(stack=STACK, block=0),
        FfnEdit(stack=STACK, block=5),
    ],
    "flux": [
        DepthEdit(stack="single_transformer_blocks", first=1, last=3),
        DepthEdit(stack=STACK, first=0, last=1),
        FfnEdit(stack=STACK, block=2),
    ],
    "sd3": [DepthEdit(stack=STACK, first=0, last=1), TextStreamEdit(stack=STACK, source=3, last=5)],
}
BUILD = {"qwen": models.tiny_qwen, "flux": models.tiny_flux, "sd3": models.tiny_sd3}


def recorded(model: nn.Module, kwargs: dict[str, Any]) -> Calls:
    other = models.other_kwargs(model)
    # More tokens than channels in each stream.
    every = [kwargs, other, {**other, "hidden_states": 0.5 * other["hidden_states"]}]
    return Calls(
        [Call(k, ("a",), 0.5, i, len(k["hidden_states"])) for i, k in enumerate(every)], fingerprint(model)
    )


def saved(name: str, folder: Path, size: str = "200KB") -> tuple[Plan, Calls]:
    """Save a small model in shards; its plan and calls of it."""
    model, kwargs = BUILD[name]()
    model.save_pretrained(folder, max_shard_size=size)  # type: ignore[operator]
    return Plan(edits=PLANS[name], model=fingerprint(model)), recorded(model, kwargs)


@pytest.mark.parametrize(
    ("name", "size"), [("qwen", "200KB"), ("qwen", "5GB"), ("flux", "200KB"), ("sd3", "200KB")]
)
def test_the_folder_is_that_of_the_unstreamed_rewrite(name: str, size: str, tmp_path: Path) -> None:
    plan, calls = saved(name, tmp_path / "teacher", size)
    model = open_source(str(tmp_path / "teacher")).transformer()
    plain = rewrite(trace(model, calls.examples()), plan, calls)
    plain.plug(students=plain.edits).save(tmp_path / "plain")
    made = rewrite_streamed(
        open_source(str(tmp_path / "teacher")).checkpoint(), plan, tmp_path / "streamed", calls
    )
    assert made.plan == plain.plan and made.students == plain.students
    for file in ("ppcl.json", PLAN, f"{TEACHER}/config.json"):
        mine, theirs = tmp_path / "streamed" / file, tmp_path / "plain" / file
        assert json.loads(mine.read_text()) == json.loads(theirs.read_text())
    students, expected = load_file(tmp_path / "streamed" / STUDENTS), load_file(tmp_path / "plain" / STUDENTS)
    assert students.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(students[key], tensor) and students[key].dtype == tensor.dtype, key
    names = [{path.name for path in (tmp_path / kind).iterdir()} for kind in ("streamed", "plain")]
    assert names[0] == names[1]
    loaded = ppcl_fx.load(tmp_path / "streamed")
    with torch.no_grad():
        assert torch.equal(loaded(**calls[1].kwargs)[0], plain(**calls[1].kwargs)[0])
        loaded.plug(students=[])
        assert torch.equal(loaded(**calls[1].kwargs)[0], model(**calls[1].kwargs)[0])
    loaded.plug(students=loaded.edits).save(tmp_path / "again")
    assert load_file(tmp_path / "again" / TEACHER / ONE_FILE).keys() == model.state_dict().keys()


def test_a_named_plan_says_what_is_plugged(tmp_path: Path) -> None:
    """A size without its blocks, as the paper's 14 B: the students that fit no more go back to their teacher."""
    _, calls = saved("qwen", tmp_path / "teacher")
    model = open_source(str(tmp_path / "teacher")).transformer()
    gm = trace(model, calls.examples())
    small = NamedPlan(name="paper:small", blocks={STACK: 6}, edits=PLANS["qwen"], params=0, budget=None, says="tiny")
    plain = rewrite(gm, small.plan(), calls)
    least, whole = plain.param_count(plain.edits), plain.teacher_params
    sized = small.model_copy(update={"budget": (least + whole) // 2})
    plugged = sized.students(plain)
    assert 0 < len(plugged) < len(plain.edits)
    plain.plug(students=plugged).save(tmp_path / "plain")
    made = rewrite_streamed(
        open_source(str(tmp_path / "teacher")).checkpoint(), sized.plan(), tmp_path / "out", calls, named=sized
    )
    assert list(made.students) == plugged and made.plan == plain.plan
    for file in ("ppcl.json", PLAN):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "plain" / file).read_text()
    students, expected = load_file(tmp_path / "out" / STUDENTS), load_file(tmp_path / "plain" / STUDENTS)
    assert all(torch.equal(students[key], tensor) for key, tensor in expected.items())
    loaded = ppcl_fx.load(tmp_path / "out")
    assert list(loaded.students) == plugged and loaded.param_count() <= (least + whole) // 2


def test_a_named_plan_for_other_blocks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")
    checkpoint = open_source(str(tmp_path / "teacher")).checkpoint()
    other = NamedPlan(name="paper:other", blocks={STACK: 60}, edits=plan.edits, params=0, budget=None, says="")
    with pytest.raises(Refusal, match="made for a model with 60 transformer_blocks, and this one has 6"):
        rewrite_streamed(checkpoint, other.plan(), tmp_path / "out", calls, named=other)
    assert not (tmp_path / "out").exists()


def test_the_teachers_files_are_linked_and_not_copied(tmp_path: Path) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")
    rewrite_streamed(
        open_source(str(tmp_path / "teacher")).checkpoint(), plan, tmp_path / "out", calls, fit=None
    )
    for shard in (tmp_path / "teacher").glob("*.safetensors"):
        assert (tmp_path / "out" / TEACHER / shard.name).samefile(shard)
    projectors = {
        k: t for k, t in load_file(tmp_path / "out" / STUDENTS).items() if k.startswith("projectors.")
    }
    assert projectors and not any(t.any() for t in projectors.values())


def test_they_are_copied_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")

    def refuse(*args: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    rewrite_streamed(
        open_source(str(tmp_path / "teacher")).checkpoint(), plan, tmp_path / "out", calls, fit=None
    )
    for shard in (tmp_path / "teacher").glob("*.safetensors"):
        copy = tmp_path / "out" / TEACHER / shard.name
        assert copy.read_bytes() == shard.read_bytes() and not copy.samefile(shard)
    assert ppcl_fx.load(tmp_path / "out").edits == plan.ids


def test_students_keep_the_dtype_of_the_teachers_files(tmp_path: Path) -> None:
    plan, _ = saved("qwen", tmp_path / "teacher")
    model, kwargs = models.tiny_qwen()[0], models.qwen_kwargs(text=20, height=6)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="200KB")  # type: ignore[operator]
    half = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }
    checkpoint = open_source(str(tmp_path / "half")).checkpoint()
    calls = Calls([Call(half, ("a",), 0.5, 0, 2)], checkpoint.fingerprint)
    rewrite_streamed(checkpoint, plan.model_copy(update={"model": ""}), tmp_path / "out", calls)
    loaded = ppcl_fx.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert loaded(**half)[0].isfinite().all()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files, "ROOM", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(stream_rewrite, "write_students", lambda *args: pytest.fail("something was written"))
    with pytest.raises(PpclError, match="the disk has 0.0 MiB free and .* are needed"):
        rewrite_streamed(open_source(str(tmp_path / "teacher")).checkpoint(), plan, tmp_path / "out", calls)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_disk_that_fills_up_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PpclError, match=r"cannot be written \(No space left on device\)"):
        rewrite_streamed(
            open_source(str(tmp_path / "teacher")).checkpoint(), plan, tmp_path / "out", calls, fit=None
        )
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan, calls = saved("qwen", tmp_path / "teacher")
    with pytest.raises(PpclError, match="made for another model"):
        rewrite_streamed(
            open_source(str(tmp_path / "teacher")).checkpoint(),
            plan.model_copy(update={"model": "0" * 64}),
            tmp_path / "out",
            calls,
        )


def test_a_long_file_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.int64),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.tensor(2.0),
        "d": torch.zeros(0, 4),
        "e": torch.arange(6.0).reshape(2, 3).T,
        "f": torch.tensor([True, False, True]),
    }
    forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_long(tmp_path / "long.safetensors", forms, tensors.__getitem__)
    found = load_file(tmp_path / "long.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
