"""The demo: its options, its arithmetic, and what it leaves alone. `make demo` runs the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from ppcl_fx import demo, demo_results
from ppcl_fx.errors import PpclError
from ppcl_fx.export.one_graph import Exported
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan
from ppcl_fx.shapes.captions import CATEGORIES, prompts
from ppcl_fx.shapes.score import Drawn


class Cut:
    """As much of a pluggable model as counting blocks needs."""

    plan = Plan(
        edits=[
            DepthEdit(stack="b", first=1, last=3),
            DepthEdit(stack="b", first=4, last=5),
            FfnEdit(stack="b", block=0),
        ]
    )


def _row(
    keep: float, overall: float, students: tuple[str, ...] = (), finetuned: bool = False, weights: str = "stored"
) -> demo_results.Row:
    drawn = [
        Drawn(prompt, torch.full((3, 24, 24), 1.0 if i else -1.0), i)
        for category in CATEGORIES
        for i, prompt in enumerate(prompts(category, 2, 0))
    ]
    done = Exported(keep, Path("keep.onnx"), 100, students, 23, {"traced": 1e-6}, 1e-6, 1.0, 1.0)
    file = demo_results.ExportedFile(keep, done, GraphModule(nn.Module(), Graph()), finetuned, weights)
    return demo_results.Row(file, drawn, dict.fromkeys([*CATEGORIES, "overall"], overall))


def test_clear_removes_what_a_demo_left_and_nothing_else(tmp_path: Path) -> None:
    demo.clear(tmp_path)
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "index.json").write_text('{"model": "", "fingerprint": "", "calls": []}')
    (tmp_path / "summary.json").write_text("[]")
    (tmp_path / "mine.txt").write_text("keep me")
    demo.clear(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["demo.json", "mine.txt"]


def test_clear_removes_nothing_of_others(tmp_path: Path) -> None:
    """Everything is looked at before the first thing is removed."""
    pictures, train = tmp_path / "pictures", tmp_path / "train"
    pictures.mkdir()
    (pictures / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(PpclError, match="pictures: is there, and no demo left it"):
        demo.clear(tmp_path)
    (tmp_path / "demo.json").write_text('{"kind": "demo"}')
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(PpclError, match="pictures: holds holiday.jpg, which ppcl-fx did not write"):
        demo.clear(tmp_path)
    assert (pictures / "holiday.jpg").exists() and (tmp_path / "summary.json").exists()
    pictures.rename(tmp_path / "elsewhere")
    train.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PpclError, match="train: a link to"):
        demo.clear(tmp_path)
    assert (train / "holiday.jpg").exists()


def test_output_that_is_a_file_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant", "unifrom"], "did you mean 'uniform'?"),
        (["--steps", "600,200"], "give three numbers"),
        (["--steps", "600,200,0"], "give three numbers"),
        (["--steps", "a,b,c"], "give three numbers"),
        (["--per-category", "0"], "--per-category is 0"),
        (["--recorded", "-1"], "--recorded is -1"),
        (["--keep", "0.7,0.5"], "give 1.0 (the teacher)"),
        (["--keep", "1.0,0.5,0.7"], "then falling shares"),
        (["--keep", "1.0,half"], "then falling shares"),
    ],
)
def test_bad_options_say_what_to_do(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_options_become_settings() -> None:
    given = demo.parse(["--steps", "3,2,1", "--variant", "sequential", "--out", "x", "--per-category", "5"])
    assert (given.steps, given.variant, given.out, given.per_category) == (
        (3, 2, 1),
        "sequential",
        Path("x"),
        5,
    )
    assert demo.parse([]) == demo.DemoSettings(Path("build/demo"))


def test_every_variant_gets_the_same_number_of_steps() -> None:
    assert demo.fitting_steps((6, 3, 2), {"depth", "ffn"}) == {"depth": 6, "width": 3, "finetune": 2}
    assert demo.fitting_steps((6, 3, 2), {"depth"})["depth"] == 9
    assert demo.fitting_steps((6, 3, 2), {"text_stream"})["width"] == 9


def test_blocks_of_a_mixture() -> None:
    model: Any = Cut()
    assert demo_results.blocks_left(model, (), 8) == 8
    assert demo_results.blocks_left(model, ("depth:b.1-3", "ffn:b.0"), 8) == 6
    assert demo_results.blocks_left(model, ("depth:b.1-3", "depth:b.4-5"), 8) == 5


def test_drop_and_speed_up_are_against_the_teacher() -> None:
    model: Any = Cut()
    rows = [
        _row(1.0, 0.8),
        _row(0.5, 0.6, ("depth:b.1-3",)),
        _row(0.5, 0.9, ("depth:b.1-3",), finetuned=True),
        _row(0.5, 0.5, ("depth:b.1-3",), weights="int4"),
    ]
    engines = [{"latency_ms": ms, "parity_max_abs": 1e-6, "weight_bytes": 2**20} for ms in (8.0, 4.0, 2.0, 4.0)]
    ratios = demo_results.summary(rows, engines, model, 8)
    assert [r["drop_pct"] for r in ratios] == [0.0, 25.0, -12.5, 37.5]
    assert [r["speedup"] for r in ratios] == [1.0, 2.0, 4.0, 2.0]
    assert [r["blocks"] for r in ratios] == [8, 6, 6, 6]
    assert [r["name"] for r in ratios] == ["teacher", "50%", "50%, fine-tuned", "50%, INT4"]
    nothing = demo_results.summary([_row(1.0, 0.0)], engines[:1], model, 8)
    assert nothing[0]["drop_pct"] is None
    assert [t.row_count for t in demo_results.tables([*ratios, *nothing])] == [5, 5]


def test_grid_has_every_category_and_every_model() -> None:
    grid = demo_results.picture_grid([_row(1.0, 1.0), _row(0.5, 1.0)])
    assert list(grid.columns) == ["teacher", "50%"]
    assert len(grid.prompts) == 2 * len(CATEGORIES)
    assert grid.marks is not None
    assert grid.marks[0] == [False, False]
    assert grid.marks[1] == [True, True]


def test_pictures_become_pixels() -> None:
    picture = torch.tensor([-1.0, 0.0, 1.0, 9.0]).reshape(1, 2, 2).expand(3, 2, 2)
    image = demo_results.to_image(picture)
    assert [image.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [(v, v, v) for v in (0, 128, 255, 255)]
