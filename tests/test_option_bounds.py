"""Every option has a range, looked at before anything slow is imported; what is printed cannot move a cursor."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ppcl_fx.cli.app import main
from ppcl_fx.cli.boundary import printable
from ppcl_fx.errors import OptionError, PpclError
from ppcl_fx.io.memory import parse_size
from ppcl_fx.passes.options import RewriteConfig
from ppcl_fx.train.config import resolve

HUGE = "1" + "0" * 30
REFUSED = {
    "train NOPE --calls CALLS": "NOPE: no such folder.*; give what 'ppcl-fx rewrite' wrote",
    "train EMPTY --calls CALLS": "ppcl.json: no such file; give what 'ppcl-fx rewrite' wrote",
    "train STUDENT --calls NOPE": "NOPE: no such folder.*; give recorded calls",
    "train STUDENT --calls EMPTY": "index.json: no such file; give recorded calls",
    "train STUDENT --prompts NOPE --pipeline shapes": "NOPE: no such file",
    "train STUDENT --images NOPE --pipeline shapes": "NOPE: no such file",
    "train STUDENT --prompts FILE --pipeline NOPE": "NOPE: no such model",
    "train STUDENT --calls CALLS --config NOPE": "NOPE: no such file",
    "export NOPE -o OUT": "NOPE: no such folder",
    "export STUDENT -o OUT --calls NOPE": "NOPE: no such folder",
    "export STUDENT -o OUT --calls CALLS --pipeline NOPE": "NOPE: no such model",
    "verify NOPE": "NOPE: no such folder",
    "build NOPE": "NOPE: no such folder.*; give what 'ppcl-fx export' wrote",
    "rewrite NOPE --plan FILE --calls CALLS -o OUT": "NOPE: no such model",
    "rewrite shapes --plan FILE --calls NOPE -o OUT": "NOPE: no such folder",
    "rewrite shapes --analysis NOPE --calls CALLS -o OUT": "NOPE: no such file",
    "rewrite shapes --released NOPE --calls CALLS -o OUT": "NOPE: no such folder",
    "analyze NOPE -o OUT": "NOPE: no such model",
    "analyze shapes -o OUT --calls NOPE": "NOPE: no such folder",
    # numbers
    f"analyze shapes -o OUT --steps {HUGE}": "--steps.*10000",
    "analyze shapes -o OUT --steps 1e20": "--steps.*integer",
    "analyze shapes -o OUT --refine-steps 10000000000": "--refine-steps.*1000000",
    f"analyze shapes -o OUT --seed {HUGE}": "--seed.*9223372036854775807",
    "analyze shapes -o OUT --seed -1": "--seed.*0",
    "analyze shapes -o OUT --ridge nan": "--ridge",
    "analyze shapes -o OUT --ridge inf": "--ridge",
    f"analyze shapes -o OUT --samples {HUGE}": "--samples",
    f"analyze shapes -o OUT --batch-size {HUGE}": "--batch-size",
    f"analyze shapes -o OUT --calls CALLS --memory-limit {HUGE}": "--memory-limit .*at most 1024 TiB",
    "analyze shapes -o OUT --calls CALLS --memory-limit 1e20": "--memory-limit 1e20: not a size",
    f"analyze shapes -o OUT --calls CALLS --memory-limit {'9' * 400}": "--memory-limit .*at most 1024 TiB",
    "analyze shapes -o OUT --calls CALLS --memory-limit 0.1": "at least one byte",
    "rewrite shapes --analysis FILE --calls CALLS -o OUT --keep nan": "--keep nan",
    "rewrite shapes --analysis FILE --calls CALLS -o OUT --params 1e20": "--params 1e20",
    f"train STUDENT --calls CALLS --steps {HUGE},1,1": "--steps .*from 1 to 1000000000",
    "train STUDENT --calls CALLS --steps ٣,1,1": "--steps .*whole numbers",
    "train STUDENT --calls CALLS --lr 1e308": r"training option lr: .*less than or equal to 10, not '1e308'",
    "train STUDENT --calls CALLS --finetune-lr nan": "training option finetune_lr",
    f"train STUDENT --calls CALLS --seed {HUGE}": "training option seed",
    f"train STUDENT --calls CALLS --every {HUGE}": "training option every",
    f"train STUDENT --calls CALLS --warmup {HUGE}": "training option warmup",
    "train STUDENT --calls CALLS --betas 0.9,1.0": "training option betas.1",
    "train STUDENT --calls CALLS --betas 0.9": "training option betas",
    "train STUDENT --calls CALLS --clip inf": "training option clip",
    "train STUDENT --calls CALLS --weight-decay 1e308": "training option weight_decay",
    "train STUDENT --calls CALLS --weights image=0,text=0,linear=0": "weights: all of them are 0, so there is nothing",
    "train STUDENT --calls CALLS --weights image=1e308": "training option weights.image",
    "train STUDENT --calls CALLS --rank-timeout nan": "--rank-timeout",
    "export STUDENT -o OUT --tolerance nan": "--tolerance",
    "export STUDENT -o OUT --tolerance inf": "--tolerance",
    f"export STUDENT -o OUT --runs {HUGE}": "--runs",
    "export STUDENT -o OUT --weights int4": "--weights int4: rounding needs the inputs .*; give --calls",
    "export STUDENT -o OUT --weights int5": "not one of stored, int8, int4, fp8 .did you mean 'int8'",
    "export STUDENT -o OUT --weights int4 --block 0": "--block",
    "export STUDENT -o OUT --weights int4 --weight-error nan": "--weight-error",
    "export STUDENT -o OUT --block 64": "--block: only with --weights",
    "export STUDENT -o OUT --keep 1.0,abc": "--keep abc: not a number",
    "export STUDENT -o OUT --keep nan": "--keep nan",
    "export STUDENT -o OUT --keep 0.5,0.50": "--keep 0.5,0.50: 0.5 is there twice",
    "export STUDENT -o OUT --format tensorrt --workspace 1e20": "--workspace 1e20: not a size",
    "export STUDENT -o OUT --format tensorrt --text 1-": "--text 1-: not a range",
    # words
    "train STUDENT --calls CALLS --compile-backend abc": "compile_backend 'abc' has no use without compile",
    "train STUDENT --calls CALLS --recorded exakt": "training option recorded",
    "train STUDENT --calls CALLS --optimizer adam": "training option optimizer",
    "train STUDENT --calls CALLS --stage depth,depth": "stages depth,depth are out of order or repeated",
    "train STUDENT --calls CALLS --stage dept": "unknown stage 'dept' .did you mean 'depth'",
    "rewrite shapes --analysis FILE --calls CALLS -o OUT --select papr": "--select papr: .*did you mean 'paper'",
    "rewrite shapes --plan FILE --calls CALLS -o OUT --init fist": "--init fist: .*did you mean 'first'",
    "export STUDENT -o OUT --dtype bf61": "--dtype bf61: .*did you mean 'bf16'",
    "export STUDENT -o OUT --format onx": "--format onx: .*did you mean 'onnx'",
    "analyze shapes -o OUT --calls CALLS --memory-limit 1GiB --device cuba": "--device cuba: .*did you mean 'cuda'",
    "analyze shapes -o OUT --calls CALLS --memory-limit 1GiB --device meta": "--device meta: no device",
    "analyze shapes -o OUT --calls CALLS --memory-limit 1GiB --device cuda:99999999999": "no device",
    # words without a meaning
    "train STUDENT --calls CALLS --dry-run --log abc": "--log: not with --memory-limit or --dry-run",
    "train STUDENT --calls CALLS --memory-limit 1GiB --log-every 2": "--log-every: not with --memory-limit",
    "analyze shapes -o OUT --calls CALLS --seed 1": "--seed: nothing is recorded with --calls",
    "analyze shapes -o OUT --calls CALLS --steps 3": "--steps: nothing is recorded with --calls",
    "rewrite shapes --plan FILE --calls CALLS -o OUT --select paper": "--select: an analysis chooses by it",
    "rewrite shapes --plan FILE --calls CALLS -o OUT --stream image": "--stream: an analysis chooses by it",
    "rewrite shapes --plan FILE --calls CALLS -o OUT --no-width": "--width: an analysis chooses by it",
    "export STUDENT -o OUT --check-calls 3": "--check-calls: there are no recorded calls",
    "export STUDENT -o OUT --sampling-tolerance 1": "--sampling-tolerance: there is no sampling run",
    "export STUDENT -o OUT --format diffusers --runs 3": "--runs: model folders are not compared",
    "export STUDENT -o OUT --format released --dtype bf16": "--dtype: not for --format released",
    # nothing
    "analyze shapes -o ''": "-o: an empty value",
    "analyze shapes --out=": "--out: an empty value",
    "analyze '' -o OUT": "analyze: an empty value",
    "train STUDENT --calls ' '": "--calls: an empty value",
    "train STUDENT --calls CALLS --log ''": "--log: an empty value",
}
SCRIPT = """
import contextlib, io, json, sys
from ppcl_fx.cli.app import main
found = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments)
    slow = sorted({"torch", "diffusers", "transformers", "onnx", "onnxruntime"} & sys.modules.keys())
    found.append([code, said.getvalue(), slow])
json.dump(found, sys.stdout)
"""


def test_wrong_options_are_one_line_before_anything_slow_is_imported(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("STUDENT", "CALLS", "EMPTY", "FILE", "OUT", "NOPE")}
    for name in ("STUDENT", "CALLS", "EMPTY"):
        places[name].mkdir()
    (places["STUDENT"] / "ppcl.json").write_text("{}")
    (places["CALLS"] / "index.json").write_text("{}")
    places["FILE"].write_text("{}")
    commands = [[str(places.get(word, word)) for word in shlex.split(line)] for line in REFUSED]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    wrong = {}
    for (line, expected), (code, said, slow) in zip(REFUSED.items(), json.loads(run.stdout), strict=True):
        if code != 2 or slow or len(said.splitlines()) != 1 or not re.search(expected, said):
            wrong[line] = (code, said, slow)
    assert wrong == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CALLS", "EMPTY", "FILE", "STUDENT"]


@pytest.mark.parametrize(
    ("toml", "why"),
    [
        ("lr = 1e308", "lr: .*less than or equal to 10"),
        ("lr = nan", "lr"),
        ("seed = 100000000000000000000", "seed"),
        ("steps = [1, 1, 10000000000]", "steps.2"),
        ("clip = inf", "clip"),
        ('log = ""', "log"),
        ('log = "a\\u0000b"', "log"),
        ('compile_backend = "abc"', "compile_backend 'abc' has no use"),
        ("[weights]\nimage = 0\ntext = 0\nlinear = 0", "weights: all of them are 0"),
        ("[weights]\nimage = inf", "weights.image"),
    ],
)
def test_a_file_has_the_same_bounds(tmp_path: Path, toml: str, why: str) -> None:
    (tmp_path / "train.toml").write_text(toml)
    with pytest.raises(PpclError, match=f"train.toml: training options?:? {why}") as error:
        resolve(tmp_path / "train.toml")
    assert "\n" not in str(error.value)


def test_sizes_have_bounds() -> None:
    assert parse_size("--x", "1024TiB") == 2**50 and parse_size("--x", "1TB") == 10**12 and parse_size("--x", "1") == 1
    for text in ("1025TiB", "0", "0.5", "9" * 500, "٣GiB"):
        with pytest.raises(PpclError, match="--x"):
            parse_size("--x", text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with ü and 猫", "plain, with ü and 猫"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\x07\x7f\x9b", "a\\rb\\x07\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("half \udcff", "half \\udcff"),
    ],
)
def test_what_would_move_a_cursor_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.encode()


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_path_is_printed_without_its_escapes(capfd: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main(["build", "/no\x1b]0;mine\x07", *more]) == 2
    out, err = capfd.readouterr()
    assert "/no\\x1b]0;mine\\x07: no such folder" in err and "\x1b" not in err + out
    assert main(["train", "/no\udcff", "--calls", "x", *more]) == 2
    out, err = capfd.readouterr()
    assert "/no\\udcff: holds bytes that are not UTF-8; give another name" in err
    assert not more or json.loads(out)["error"].startswith("/no\\udcff: ")


def test_options_are_given_by_name_over_those_of_a_model() -> None:
    config = RewriteConfig(width=False, select="budget")
    both = RewriteConfig.merged(config, {"rule": "uniform", "ffn": 2})
    assert (both.select, both.width, both.ffn, both.stream) == ("uniform", False, 2, None)
    assert both.model_fields_set == {"width", "select", "ffn"} and config.select == "budget"
    with pytest.raises(OptionError, match=r"option widht: there is no such option \(did you mean 'width'\?\)"):
        RewriteConfig.merged(None, {"widht": True})
