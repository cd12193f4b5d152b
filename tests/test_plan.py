"""Plans: JSON that round-trips, and that says why it does not hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ppcl_fx.errors import PpclError
from ppcl_fx.io.files import read_json, write_json
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit, known

STACK = "transformer_blocks"


def plan(*edits: Edit) -> Plan:
    return Plan(model="abc", teacher_params=100, params=60, edits=list(edits), reason=["by hand"])


def depth(first: int, last: int, stack: str = STACK) -> DepthEdit:
    return DepthEdit(stack=stack, first=first, last=last)


def text(source: int, last: int) -> TextStreamEdit:
    return TextStreamEdit(stack=STACK, source=source, last=last)


def test_ids_name_kind_stack_and_blocks() -> None:
    assert plan(depth(3, 5), FfnEdit(stack=STACK, block=2), text(50, 59)).ids == [
        "depth:transformer_blocks.3-5",
        "ffn:transformer_blocks.2",
        "text_stream:transformer_blocks.50-59",
    ]


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    middle = DepthEdit(stack=STACK, first=1, last=2, init="middle", damage=0.25)
    written = plan(middle, FfnEdit(stack=STACK, block=0), text(4, 5))
    write_json(tmp_path / "plan.json", written)
    assert read_json(tmp_path / "plan.json", Plan) == written


def test_a_plan_can_be_written_by_hand() -> None:
    text = '{"edits": [{"kind": "depth", "stack": "transformer_blocks", "first": 0, "last": 3}]}'
    read = Plan.model_validate_json(text)
    assert read.edits == [depth(0, 3)]
    assert (read.version, read.model, read.params) == (1, "", 0)


def test_intervals_come_sorted_and_by_stack() -> None:
    one = plan(depth(8, 9), depth(0, 1, "single_transformer_blocks"), depth(2, 3))
    assert [(e.stack, e.first) for e in one.depth()] == [("single_transformer_blocks", 0), (STACK, 2), (STACK, 8)]
    assert [e.first for e in one.depth(STACK)] == [2, 8]


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([depth(1, 3), depth(1, 3)], "holds depth:transformer_blocks.1-3 twice; remove one"),
        ([FfnEdit(stack=STACK, block=1), FfnEdit(stack=STACK, block=1, damage=0.5)], "ffn:transformer_blocks.1 twice"),
        ([depth(3, 5), depth(1, 3)], r"\[1, 3\] and \[3, 5\] of transformer_blocks overlap.* at 4 or later"),
        ([depth(0, 9), depth(2, 3)], r"\[0, 9\] and \[2, 3\] of transformer_blocks overlap"),
        ([text(5, 9), text(1, 6)], "text groups .*1-6 and .*5-9 overlap; let the second begin at 6"),
    ],
)
def test_overlaps_and_repeats_are_refused(edits: list[Edit], words: str) -> None:
    with pytest.raises(PpclError, match=words):
        plan(*edits).check()


def test_neighbours_and_other_stacks_do_not_overlap() -> None:
    plan(depth(0, 1), depth(2, 3), depth(0, 3, "single_transformer_blocks")).check()
    plan(text(1, 3), text(3, 5), depth(6, 7)).check()


@pytest.mark.parametrize(
    "edit",
    [
        {"kind": "depth", "stack": STACK, "first": 3, "last": 3},
        {"kind": "depth", "stack": STACK, "first": 3, "last": 1},
        {"kind": "depth", "stack": STACK, "first": -1, "last": 1},
        {"kind": "depth", "stack": STACK, "first": 1, "last": 2, "init": "last"},
        {"kind": "depth", "stack": STACK, "first": 1, "last": 2, "inti": "middle"},
        {"kind": "depth", "first": 1, "last": 2},
        {"kind": "text_stream", "stack": STACK, "source": 3, "last": 3},
        {"kind": "width", "stack": STACK, "block": 3},
    ],
)
def test_a_wrong_edit_is_not_read(edit: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Plan.model_validate_json(json.dumps({"edits": [edit]}))


def test_an_unknown_field_or_version_is_one_line_for_the_user(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for content, word in (('{"edit": []}', "edit"), ('{"version": 2}', "version")):
        path.write_text(content)
        with pytest.raises(PpclError, match=word) as error:
            read_json(path, Plan)
        assert "\n" not in str(error.value)
        assert "plan.json" in str(error.value)


def test_an_unknown_id_is_named_with_its_neighbour() -> None:
    ids = plan(depth(3, 5), FfnEdit(stack=STACK, block=2)).ids
    known(ids, ids)
    with pytest.raises(PpclError, match=r"no edit 'depth:transformer_blocks.3-6'.*did you mean '.*\.3-5'"):
        known(ids, ["depth:transformer_blocks.3-6"])
    with pytest.raises(PpclError, match="its edits are none"):
        known([], ["x"])
