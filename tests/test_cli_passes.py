"""`ppcl-fx passes` and `ppcl-fx run-passes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppcl_fx.cli.app import main
from ppcl_fx.passes.registry import registered
from tests.cli_place import Place

pytestmark = pytest.mark.slow


def test_the_passes_are_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = Place(tmp_path, capfd).ok("passes")["passes"]
    listed = {one["name"]: one for one in found}
    assert set(listed) == set(registered())
    assert listed["cut-depth"] | {"does": ""} == {
        "name": "cut-depth",
        "kind": "rewrite",
        "numerics": "approximate",
        "options": ["stack: str", "first: int", "last: int"],
        "does": "",
        "written": True,
    }
    assert not listed["linear-probes"]["written"]
    assert all(one["does"] for one in found)


def test_passes_run_on_a_traced_model_and_say_what_they_did(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = Place(written, capfd)
    cut = "cut-depth{stack=transformer_blocks,first=1,last=2}"
    text = f"{cut},depth{{stack=transformer_blocks,first=40,last=41}},dead-code"
    found = place.ok("run-passes", place.model, text, "--calls", place.calls)
    one, two, three = found["passes"]
    assert one["pass"] == cut
    assert one["modified"]
    assert one["nodes"][1] < one["nodes"][0]
    assert not two["modified"]
    assert "has no block 40" in two["refused"][0]["reason"]
    assert three == {"pass": "dead-code", "modified": False, "nodes": [one["nodes"][1]] * 2, "refused": []}
    assert found["params_after"] < found["params_before"]
    assert main(["run-passes", str(place.model), text, "--calls", str(place.calls)]) == 0
    out = capfd.readouterr().out
    assert f"{cut}: modified, " in out
    assert "refused: transformer_blocks has no block 40" in out


def test_a_text_that_is_no_pipeline_is_refused(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = Place(written, capfd)
    line = place.refused("run-passes", place.model, "cut-dept", "--calls", place.calls)
    assert "did you mean 'cut-depth'" in line
