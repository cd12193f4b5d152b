"""The package as it is built, installed and imported: nothing forgotten, nothing loaded too early."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import ppcl_fx
from ppcl_fx._names import MOVED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "train", "export")
FUNCTIONS = ("analyze", "load", "record", "rewrite", "select", "stacks", "trace")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "onnxruntime": "onnxruntime-gpu",
    "pydantic_core": "pydantic",
    "tensorrt_bindings": "tensorrt",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    "tensorrt_rtx_libs": "tensorrt-rtx-cu13-libs",
}
"""Where a distribution's name is not the name it is imported by."""


def modules_on_disk() -> set[str]:
    """Each module of the package, by its path in a wheel."""
    found = set()
    for folder, _, names in os.walk(ROOT / "ppcl_fx", followlinks=True):
        found |= {Path(folder, name).relative_to(ROOT).as_posix() for name in names if name.endswith(".py")}
    return found


def weights_on_disk() -> set[str]:
    folder = ROOT / "ppcl_fx" / "shapes" / "weights"
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
        cwd=environment.get("PWD", ROOT),
    )


def test_every_package_on_disk_is_listed() -> None:
    on_disk = {str(Path(path).parent).replace("/", ".") for path in modules_on_disk()}
    assert set(SETUPTOOLS["packages"]) == on_disk


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_says_what_it_is(package: str) -> None:
    init = ROOT.joinpath(*package.split(".")) / "__init__.py"
    assert init.is_file()
    assert init.read_text(encoding="utf-8").startswith('"""')


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_relative_links(room: str) -> None:
    link = ROOT / "ppcl_fx" / room
    assert link.is_symlink()
    assert Path(os.readlink(link)) == Path("..", room)
    assert SETUPTOOLS["package-dir"][f"ppcl_fx.{room}"] == room


def test_import_is_without_torch() -> None:
    code = (
        "import sys, ppcl_fx, ppcl_fx.errors, ppcl_fx.cli.app; dir(ppcl_fx); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib', 'onnx'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_typed_and_documented(name: str) -> None:
    function = getattr(ppcl_fx, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", sorted(set(ppcl_fx.__all__) - {"__version__"}))
def test_public_names_come_from_the_package(name: str) -> None:
    assert getattr(ppcl_fx, name).__module__.startswith("ppcl_fx.")
    assert name in dir(ppcl_fx)


def test_former_names_of_modules_are_the_same_modules() -> None:
    code = f"""
import importlib, sys
for former, name in {MOVED!r}.items():
    old, new = importlib.import_module(former), importlib.import_module(name)
    if not (old is new and new.__name__ == new.__spec__.name == name):
        sys.exit(f"{{former}} is not {{name}}")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_gets_a_near_match() -> None:
    with pytest.raises(AttributeError, match="did you mean 'analyze'"):
        ppcl_fx.analyse  # noqa: B018


def plain(distribution: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_requirement_is_pinned_and_satisfied_by_its_pin() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        plain(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    listed = [*PROJECT["project"]["dependencies"]]
    for extra in ("export", "lora", "train", "dev"):
        listed += PROJECT["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, listed):
        name = plain(requirement.name)
        if name == "ppcl-fx" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        assert name in pins, f"{name} has no line in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} refuses its own pin {pins[name]}"


def imported_distributions() -> set[str]:
    """The third-party distributions that the package's modules import, wherever in a file."""
    names: set[str] = set()
    for path in modules_on_disk():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    outside = names - set(sys.stdlib_module_names) - {"ppcl_fx"}
    return {plain(DISTRIBUTIONS.get(name, name)) for name in outside}


def declared(*extras: str) -> set[str]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return {plain(Requirement(line).name) for line in lines}


def test_every_import_is_declared() -> None:
    assert imported_distributions() <= declared("export", "lora", "rtx", "tensorrt", "train")


def test_every_requirement_is_imported() -> None:
    # diffusers needs transformers for its pipelines' text encoders, and safetensors needs numpy to read headers.
    assert declared() - imported_distributions() <= {"transformers", "numpy"}


@pytest.mark.parametrize("room", ROOMS)
def test_short_import_names_are_banned(room: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "ppcl_fx/some.py", "-"],
        input=f"from __future__ import annotations\n\nfrom {room}.thing import name\n\nname()\n",
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TID251" in done.stdout
    assert f"import ppcl_fx.{room}" in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from an sdist made from a copy of this checkout."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    kept = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    _build("build_sdist", source, work)
    (archive,) = work.glob("*.tar.gz")
    unpacked = work / "unpacked"
    with tarfile.open(archive) as tar:
        # Python 3.11 has filters from 3.11.4 on.
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(unpacked, **safe)
    (source_again,) = unpacked.iterdir()
    _build("build_wheel", source_again, work)
    (made,) = work.glob("*.whl")
    return made


def _build(hook: str, source: Path, out: Path) -> None:
    """Call the build backend as pip does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"],
        capture_output=True,
        text=True,
        check=False,
        cwd=source,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {name for name in names if name.endswith(".py")}
    assert code == modules_on_disk()
    assert {"ppcl_fx/py.typed", "ppcl_fx/model/plans.json", *weights_on_disk()} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    packages = ", ".join(SETUPTOOLS["packages"])
    code = (
        f"import {packages}, sys; from ppcl_fx.cli.app import main; "
        "print(ppcl_fx.__file__); sys.exit(main(['--version']))"
    )
    done = run_python(code, PYTHONPATH=str(tmp_path), PWD=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(tmp_path)
    assert done.stdout.splitlines()[1] == f"ppcl-fx {ppcl_fx.__version__}"


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_are_the_same_module_under_one_name_only(name: str) -> None:
    module = importlib.import_module(f"ppcl_fx.{name}")
    assert module.__name__ == f"ppcl_fx.{name}"
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == ROOT / name
