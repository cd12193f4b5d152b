"""Exported folders: their graphs are found, and engines for them built, by ppcl-fx or by trtexec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.cli.app import main
from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.folder import build_folder
from ppcl_fx.export.tensorrt.manifest import read_engine_manifest
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import Spec
from ppcl_fx.export.tensorrt.request import BuildConfig, find_graphs, read_request
from ppcl_fx.export.tensorrt.trtexec import write_script
from ppcl_fx.export.tensorrt_api import Gpu
from ppcl_fx.io.owned_folders import ENGINES, foreign
from tests.export.fake_trt import working
from tests.export.test_tensorrt import PROFILE, SPEC, write_graph


def test_graphs_are_found_largest_first_in_the_type_of_their_engine(tmp_path: Path) -> None:
    for name in ("keep-0.5", "keep-0.7", "keep-0.7.bf16", "keep-1", "other"):
        write_graph(tmp_path / f"{name}.onnx")
    assert find_graphs(tmp_path) == {
        name: tmp_path / f"{file}.onnx"
        for name, file in (("keep-1", "keep-1"), ("keep-0.7", "keep-0.7.bf16"), ("keep-0.5", "keep-0.5"))
    }
    assert list(find_graphs(tmp_path)) == ["keep-1", "keep-0.7", "keep-0.5"]
    with pytest.raises(PpclError, match="no exported graph"):
        find_graphs(tmp_path / "weights")


def test_a_folder_is_built_from_its_request_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    for name in ("keep-1.onnx", "keep-0.5.onnx"):
        write_graph(tmp_path / name)
    BuildConfig(spec=SPEC, options=BuildOptions(stripped=True)).save(tmp_path)
    seen: list[tuple[int, str]] = []
    first = build_folder(tmp_path, api=working(), report=lambda d, t, w: seen.append((d, w)))
    assert [(one.name, one.kept, one.manifest.options.stripped) for one in first] == [
        ("keep-1", False, True), ("keep-0.5", False, True)
    ]  # fmt: skip
    assert first[0].manifest.profiles == [PROFILE]
    assert seen[0] == (0, "keep-1: Building") and seen[-1] == (100, "keep-0.5: Building")
    odd = foreign(tmp_path, ENGINES)
    assert odd is not None and odd.startswith("holds weights/keep-0.5.bin, ")  # the helper's weights; all else is known
    (tmp_path / "keep-0.5.engine").unlink()
    again = working()
    assert [one.kept for one in build_folder(tmp_path, api=again)] == [True, False]
    assert again.names().count("Builder") == 1
    other = BuildConfig(spec=SPEC)
    with pytest.raises(PpclError, match="other profiles or options; replace it with --overwrite"):
        build_folder(tmp_path, other, api=working())
    with pytest.raises(PpclError, match="does not fit; replace it with --overwrite"):
        build_folder(tmp_path, api=working(gpu=Gpu("Other", "8.0", "13.0")))
    assert not any(one.kept for one in build_folder(tmp_path, other, overwrite=True, api=working()))


def test_nothing_is_built_when_one_profile_does_not_fit(tmp_path: Path) -> None:
    write_graph(tmp_path / "keep-1.onnx")
    api = working()
    with pytest.raises(PpclError, match="no range for the batch; give --batch 1-4"):
        build_folder(tmp_path, BuildConfig(spec=Spec(tokens="64")), api=api)
    assert api.calls == []


def test_the_script_for_trtexec_says_what_the_builder_does(tmp_path: Path) -> None:
    write_graph(tmp_path / "keep-0.5.onnx")
    options = BuildOptions(stripped=True, workspace=2**30, level=2, weight_streaming=1)
    request = BuildConfig(spec=Spec(tokens="64,128", batch="1", text="1-2-8"), options=options)
    text = write_script(tmp_path, request).read_text(encoding="utf-8")
    flat = " ".join(text.replace("\\\n", " ").split())
    assert (
        "trtexec ${TYPED-} --onnx=keep-0.5.onnx --saveEngine=keep-0.5.engine.partial --skipInference "
        "--timingCacheFile=timing.cache --memPoolSize=workspace:1073741824B --builderOptimizationLevel=2 "
        "--stripWeights --allowWeightStreaming "
        "--profile=0 --minShapes=hidden_states:1x64x4,encoder_hidden_states:1x1x4 "
        "--optShapes=hidden_states:1x64x4,encoder_hidden_states:1x2x4 "
        "--maxShapes=hidden_states:1x64x4,encoder_hidden_states:1x8x4 --profile=1 --minShapes=hidden_states:1x128x4,"
    ) in flat
    assert flat.endswith("mv keep-0.5.engine.partial keep-0.5.engine")
    with pytest.raises(PpclError, match="trtexec has no argument for --refit identical"):
        write_script(tmp_path, BuildConfig(spec=SPEC, options=BuildOptions(refit="identical")))


def test_build_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_graph(tmp_path / "keep-1.onnx")
    from ppcl_fx.export.tensorrt import folder

    monkeypatch.setattr(folder, "load_builder", lambda left, kind: working())
    arguments = ["build", str(tmp_path), "--tokens", "64-4096", "--batch", "1-4", "--text", "1-512", "--stripped"]
    assert main([*arguments, "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["engine"] == str(tmp_path / "keep-1.engine") and engine["card"]["options"]["stripped"]
    assert read_request(tmp_path).spec == SPEC
    # The request stays in the folder, so that the command to build again needs no options.
    assert main(["build", str(tmp_path), "--overwrite"]) == 0
    assert read_engine_manifest(tmp_path / "keep-1.engine").profiles == [PROFILE]
    assert "not checked: the engine was not compared with PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "no-such-folder"], "no such folder; give what 'ppcl-fx export' wrote"),
        (["build", ".", "--shapes", "1024x1024"], "give --pixels-per-token 16, for example, or --tokens 4096"),
        (["build", ".", "--batch", "0-4"], "--batch 0-4: a size of 0"),
        (["build", ".", "--text", "512-1"], "--text 512-1: not in order"),
        (["build", ".", "--size", "x"], "--size x: give NAME=RANGE"),
        (["build", ".", "--refit", "identicl"], "did you mean 'identical'"),
        (["build", ".", "--workspace", "much"], "--workspace much: not a size"),
        (["export", "x", "-o", "y", "--stripped"], "--stripped: only for --format tensorrt or rtx or trtexec"),
        (["export", "x", "-o", "y", "--format", "tensorrt", "--tokens", "0"], "--tokens 0: a size of 0"),
    ],
)
def test_wrong_options_are_one_line_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
