"""The command line's manners: exit codes, one line for each error, one JSON object, and quick help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from ppcl_fx.cli.app import main
from ppcl_fx.cli.boundary import CommandResult, guarded
from ppcl_fx.cli.flags import flagged
from ppcl_fx.cli.options import check_output
from ppcl_fx.errors import PpclError, Stopped
from ppcl_fx.export.config import ExportConfig
from ppcl_fx.export.tensorrt.request import BuildConfig
from ppcl_fx.io.files import check_writable
from ppcl_fx.io.options import Config
from ppcl_fx.io.owned_folders import CHECKPOINT
from ppcl_fx.passes.options import AnalyzeConfig, RewriteConfig
from tests.options_page import PAGE, options_table, page

pytestmark = pytest.mark.slow

COMMANDS = ("analyze", "rewrite", "train", "export", "build", "passes", "run-passes")
NOBODY = 65534
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def in_one_line(error: str, *parts: str) -> bool:
    """One line, with these parts in it, and no traceback."""
    return error.startswith("ppcl-fx: ") and error.count("\n") == 1 and all(part in error for part in parts)


@pytest.mark.parametrize("arguments", [["--help"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_is_on_stdout(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ppcl-fx")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_verbose(run: Run, name: str) -> None:
    _, out, _ = run(name, "--help")
    assert "--json" in out
    assert "-v, --verbose" in out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from ppcl_fx.cli.app import main\n"
        f"codes = [main([name, '--help']) for name in {COMMANDS!r}]\n"
        f"assert codes == [0] * {len(COMMANDS)}, codes\n"
        "assert not {'torch', 'diffusers', 'numpy', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["analyse", "shapes"], ["analyse", "'analyze'"]),
        (["export", "x", "--fromat", "onnx"], ["--fromat", "--format"]),
        (["analyze", "shapes"], ["--out"]),
        (["train"], ["STUDENT", "ppcl-fx train --help"]),
        (["analyze", "shapes", "-o", "x", "--seed", "one"], ["--seed", "integer"]),
        (["analyze", "shapes", "-o", "x", "--batch-size", "0"], ["--batch-size", "1"]),
        (
            ["rewrite", "shapes", "-o", "x", "--analysis", "a.json", "--keep", "1.5"],
            ["--keep 1.5", "at most 1"],
        ),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a.json", "--keep", "half"], ["--keep half", "0.5"]),
        (["rewrite", "shapes", "-o", "x"], ["--analysis", "--plan"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--params", "12X"], ["--params 12X", "12B"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--params", "nanB"], ["--params nanB"]),
        (
            ["rewrite", "shapes", "-o", "x", "--analysis", "a", "--params", "1B", "--keep", "0.5"],
            ["--keep, --params"],
        ),
        (["rewrite", "shapes", "-o", "x", "--plan", "p.json", "--params", "1B"], ["--params", "has its size already"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--plan", "p.json"], ["--analysis, --plan"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--released", "r"], ["--analysis, --released"]),
        (["rewrite", "shapes", "-o", "x", "--released", "r"], ["--released", "--calls"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--init", "frist"], ["frist", "'first'"]),
        (["train", "x", "--calls", "c", "--stage", "depth,widht"], ["widht", "'width'"]),
        (["train", "x", "--calls", "c", "--stage", "depth", "--steps", "1,2"], ["1 stages but 2 numbers of steps"]),
        (["train", "x", "--calls", "c", "--steps", "1,0,2"], ["--steps 1,0,2", "from 1 to"]),
        (["export", "x", "-o", "y", "--format", "onx"], ["onx", "'onnx'"]),
        (["export", "x", "-o", "y", "--keep", "1.0,0"], ["--keep 0", "above 0"]),
        (["export", "x", "-o", "y", "--keep", "0.5,0.5"], ["0.5 is there twice"]),
        (["train", "x", "--calls", "c"], ["x: no such folder"]),
        (["train", "x", "--calls", "c", "--steps", "1,²,2"], ["--steps 1,²,2"]),
        (["export", "x", "-o", "y"], ["x: no such folder"]),
        (["export", "x", "-o", "y", "--tolerance", "nan"], ["--tolerance"]),
        (["export", "x", "-o", "y", "--runs", "99999999999999999999"], ["--runs", "1000000000"]),
        (["analyze", "shapes", "-o", "x", "--steps", "99999999999999999999"], ["--steps", "10000"]),
        (["analyze", "shapes", "-o", "x", "--refine-steps", "99999999999"], ["--refine-steps", "1000000"]),
        (["analyze", "shapes", "-o", "x", "--seed", "-1"], ["--seed", "0"]),
        (["analyze", "shapes", "-o", "x", "--ridge", "inf"], ["--ridge"]),
        (["analyze", "shapes", "-o", "x", "--calls", "c", "--memory-limit", "1e20"], ["--memory-limit 1e20", "12GiB"]),
        (["analyze", "shapes", "-o", "x", "--memory-limit", "9999999TiB"], ["--memory-limit", "1024 TiB"]),
        (["analyze", "shapes", "-o", "x", "--device", "cdua"], ["--device cdua", "'cuda'"]),
        (["analyze", "shapes", "-o", ""], ["-o", "empty value"]),
        (["analyze", "\udcff", "-o", "x"], ["\\udcff", "not UTF-8"]),
        (["export", "\x1b[31mred", "-o", "y"], ["\\x1b[31mred: no such folder"]),
        (["rewrite", "shapes", "-o", "x", "--analysis", "a", "--params", "1e30B"], ["--params 1e30B"]),
        (["export", "x", "-o", "y", "--samples", "3"], ["--samples", "--pipeline MODEL"]),
        (["export", "x", "-o", "y", "--format", "released", "--pipeline", "shapes"], ["--pipeline", "not compared"]),
    ],
)
def test_wrong_arguments_get_one_line(
    run: Run, arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert in_one_line(err, *parts), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["analyze", "rewrite", "export"])
def test_unwritable_output_fails_before_any_work(run: Run, name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("taken", encoding="utf-8")
    more = ["--analysis", "missing.json"] if name == "rewrite" else []
    code, _, err = run(name, "no-such-model", "-o", file, *more)
    assert code == 2
    assert in_one_line(err, str(file), "is a file")
    code, _, err = run(name, "no-such-model", "-o", file / "deeper", *more)
    assert code == 2
    assert in_one_line(err, str(file / "deeper"), "cannot be written")
    assert file.read_text(encoding="utf-8") == "taken"


def test_an_error_with_json_is_one_object(run: Run) -> None:
    code, out, err = run("rewrite", "shapes", "-o", "x", "--analysis", "a", "--keep", "1.5", "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.removeprefix("ppcl-fx: ").strip()}
    code, out, _ = run("nothing", "--json")
    assert code == 2
    assert "nothing" in json.loads(out)["error"]


def test_with_json_all_else_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(arguments: list[str]) -> CommandResult:
        print("python says")  # noqa: T201
        os.write(1, b"a C library says\n")
        subprocess.run([sys.executable, "-c", "print('a child says')"], check=True)
        return CommandResult({"answer": 42}, ["forty-two"])

    assert guarded(noisy, ["--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"answer": 42}
    assert {"python says", "a C library says", "a child says"} <= set(err.splitlines())
    print("stdout is back")  # noqa: T201
    assert capfd.readouterr().out == "stdout is back\n"

    assert guarded(noisy, []) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "forty-two"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PpclError("plan.json: of another\nmodel"), "plan.json: of another model"),
        (PermissionError(13, "Permission denied", "/nowhere/x"), "/nowhere/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (typer.BadParameter("no good"), "no good"),
    ],
)
def test_errors_of_the_user_are_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    assert guarded(fail, []) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert in_one_line(err, line)


def test_our_own_faults_are_loud(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: list[str]) -> None:
        raise RuntimeError("an invariant broke")

    with pytest.raises(RuntimeError, match="an invariant broke"):
        guarded(fail, ["--json"])
    assert json.loads(capfd.readouterr().out) == {"error": "internal error: RuntimeError: an invariant broke"}


def _signalled(number: signal.Signals, folder: Path) -> subprocess.CompletedProcess[str]:
    """Signal a program that is inside of a half-written result."""
    code = (
        "import sys, time, typer\n"
        "from pathlib import Path\n"
        "from ppcl_fx.cli.boundary import guarded\n"
        "from ppcl_fx.io.files import new_folder\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def work() -> None:\n"
        "    with new_folder(Path(sys.argv[1]) / 'result') as part:\n"
        "        (part / 'half').write_text('written')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "sys.exit(guarded(lambda args: app(args=[], standalone_mode=False), []))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def test_ctrl_c_ends_with_130_and_a_line(tmp_path: Path) -> None:
    done = _signalled(signal.SIGINT, tmp_path)
    assert done.returncode == 130
    assert in_one_line(done.stderr, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    done = _signalled(signal.SIGTERM, tmp_path)
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_parameters_are_read_as_people_write_them() -> None:
    written = {"12B": 12_000_000_000, "11.9b": 11_900_000_000, "500M": 500_000_000, "1.5e3": 1500, "7": 7}
    assert {text: RewriteConfig(params=text).params for text in written} == written  # type: ignore[arg-type]


def typed(model: type[Config], *arguments: str) -> Any:
    """What a command with the options of a model gets for these arguments."""

    def command(config: Any) -> Any:
        return config

    command.__annotations__["config"] = model
    app = typer.Typer()
    app.command()(flagged(command))
    return app(args=list(arguments), standalone_mode=False)


def test_lists_are_read_as_given() -> None:
    assert typed(ExportConfig, "--keep", "1.0, 0.7,0.5").keep == (1.0, 0.7, 0.5)
    assert typed(RewriteConfig, "--keep", "1e-3", "--rule", "paper", "--no-width") == RewriteConfig(
        keep=1e-3, select="paper", width=False
    )
    made = typed(
        ExportConfig, "--format", "tensorrt", "--size", "a=1-2", "--size", "b=3", "--workspace", "4GiB"
    )
    assert (made.build.spec.sizes, made.build.options.workspace) == ({"a": "1-2", "b": "3"}, 2**32)
    assert made.build.spec.model_fields_set == {"sizes"} and not made.onnx_only


@pytest.mark.parametrize("text", ["nan", "-0.1", "0", "1.0001", "inf", "", "0.5,0.6"])
def test_a_share_is_above_0_and_at_most_1(text: str) -> None:
    with pytest.raises(PpclError, match=re.escape(f"--keep {text}: ")):
        typed(RewriteConfig, "--keep", text)
    with pytest.raises(PpclError, match="option keep: "):
        RewriteConfig(keep=text)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [AnalyzeConfig, RewriteConfig, ExportConfig, BuildConfig])
def test_every_option_is_a_flag_and_is_described(model: type[Config], run: Run) -> None:
    name = model.__name__.removesuffix("Config").lower()
    code, out, _ = run(name, "--help")
    rows = options_table(model).splitlines()[2:]
    assert code == 0 and len(rows) >= 9
    for row in rows:
        flag, _, _, words = (cell.strip(" `") for cell in row.strip("|").split(" | "))
        assert re.search(f"  {flag}[ ,]", out) and len(words) > 5


def test_unknown_names_have_a_near_match() -> None:
    with pytest.raises(PpclError, match="option tolernce: there is no such option .did you mean 'tolerance'"):
        ExportConfig(tolernce=1)  # type: ignore[call-arg]


def test_output_checks_leave_nothing_behind(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder", kind=CHECKPOINT)
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    check_output(tmp_path / "old", kind=CHECKPOINT)
    (tmp_path / "old" / "state.json").touch()
    check_output(tmp_path / "old")
    check_output(tmp_path / "old", kind=CHECKPOINT, overwrite=True)
    with pytest.raises(PpclError, match="already exists.*--overwrite"):
        check_output(tmp_path / "old", kind=CHECKPOINT)
    (tmp_path / "old" / "mine").touch()
    with pytest.raises(PpclError, match="already exists; choose another output$"):  # --overwrite would not help
        check_output(tmp_path / "old", kind=CHECKPOINT)


def test_a_folder_without_permission_is_refused() -> None:
    folder = Path(tempfile.mkdtemp())
    me = os.geteuid()
    try:
        if me == 0:  # root may write anywhere, so another user tries
            os.chown(folder, NOBODY, -1)
            os.seteuid(NOBODY)
        check_writable(folder / "new")
        folder.chmod(0o500)
        with pytest.raises(PpclError, match="Permission denied"):
            check_writable(folder / "new")
    finally:
        os.seteuid(me)
        folder.chmod(0o700)
        folder.rmdir()


def test_progress_is_shown_where_no_bar_can_be_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppcl_fx.cli import terminal

    clock = iter([0.0, 1.0, 2.5, 3.0, 20.0, 21.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal._lines("counting") as report:
        for done in range(1, 6):
            report(done, 5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "counting: 2 of 5, about 4 s left\ncounting: 4 of 5, about 6 s left\n"


def test_the_module_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ppcl_fx", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("ppcl-fx ")


def test_work_that_a_signal_stopped_leaves_with_its_code_and_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def stop(_: list[str]) -> object:
        raise Stopped("stopped by SIGTERM at stage depth, step 3 of 6; saved", 143)

    assert guarded(stop, ["train"]) == 143
    assert capfd.readouterr().err == "ppcl-fx: stopped by SIGTERM at stage depth, step 3 of 6; saved\n"


def test_the_page_of_options_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.options_page"
