"""The TensorRT builder, against NVIDIA's real bindings where they are installed, and its refusals everywhere.

The bindings (`tensorrt-cu13-bindings`) are compiled code that needs TensorRT's libraries to load. Empty stand-ins for
those libraries are enough to look at the real classes, enumerations and signatures. That proves that every name and
keyword used exists; it does not prove that an engine builds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ppcl_fx.errors import PpclError
from ppcl_fx.export import tensorrt_api
from ppcl_fx.export.extras import need
from ppcl_fx.export.sidecar import Port
from ppcl_fx.export.tensorrt import Profile, Range, _shapes, default_profile, load_tensorrt

SYMBOLS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]

LOOK = """
import json, sys
import tensorrt_bindings as trt
found = {}
for path in json.load(sys.stdin):
    thing = trt
    for part in path.split("."):
        thing = getattr(thing, part, None)
    maker = getattr(thing, "__init__", None) if isinstance(thing, type) else thing
    found[path] = None if thing is None else {
        "doc": getattr(maker, "__doc__", "") or "", "type": type(thing).__name__, "text": str(thing)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What NVIDIA's bindings hold under every name of the table."""
    # The bindings are wheels for Linux on x86-64, and loading them without NVIDIA's libraries takes a C compiler.
    compiler = shutil.which("cc") or shutil.which("gcc")
    if importlib.util.find_spec("tensorrt_bindings") is None or sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux, a C compiler, and the package tensorrt-cu13-bindings")
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    (folder / "empty.c").write_text("typedef int nothing;\n")
    for library, text in (("nvinfer", "stub.c"), ("nvonnxparser", "empty.c"), ("nvinfer_plugin", "empty.c")):
        target = folder / f"lib{library}.so.11"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(folder / text)], check=True)
    names = [
        *tensorrt_api.CALLS,
        *tensorrt_api.VALUES,
        *tensorrt_api.PROPERTIES,
        "NoSuchThing",
        "Builder.no_such",
    ]
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        input=json.dumps(names),
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bindings_tell_what_is_missing(bindings: dict[str, Any]) -> None:
    assert bindings["NoSuchThing"] is None
    assert bindings["Builder.no_such"] is None
    assert bindings["__version__"]["text"].startswith("11.")


@pytest.mark.parametrize("path", tensorrt_api.CALLS)
def test_calls_exist_with_their_keywords(bindings: dict[str, Any], path: str) -> None:
    assert bindings[path] is not None, f"TensorRT has no {path}"
    signatures = [line for line in bindings[path]["doc"].splitlines() if "(self" in line or "(arg0" in line]
    assert signatures, bindings[path]["doc"]
    keywords = tensorrt_api.CALLS[path]
    fitting = [s for s in signatures if all(f" {keyword}:" in s for keyword in keywords)]
    assert fitting, f"{path} takes {signatures}, not {keywords}"
    # What is not given must have a default in one of the fitting signatures.
    assert any(_required(s) <= set(keywords) for s in fitting), fitting


def _required(signature: str) -> set[str]:
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    parts, depth, current = [], 0, ""
    for letter in inside:
        depth += (letter in "([<") - (letter in ")]>")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    named = [part.strip() for part in [*parts, current] if part.strip()]
    return {part.partition(":")[0] for part in named if "=" not in part} - {"self"}


@pytest.mark.parametrize("path", tensorrt_api.VALUES)
def test_values_exist(bindings: dict[str, Any], path: str) -> None:
    assert bindings[path] is not None, f"TensorRT has no {path}"


@pytest.mark.parametrize("path", tensorrt_api.PROPERTIES)
def test_properties_exist(bindings: dict[str, Any], path: str) -> None:
    assert bindings[path] is not None, f"TensorRT has no {path}"
    assert bindings[path]["type"] == "property"


def test_what_is_not_in_the_table_cannot_be_used() -> None:
    api = tensorrt_api.Api(object())
    with pytest.raises(RuntimeError, match="Builder.refit is not in the table"):
        api.call("Builder.refit", object())
    with pytest.raises(RuntimeError, match=r"listed with the keywords \('flags',\), not \(\)"):
        api.call("Builder.create_network", object())
    with pytest.raises(RuntimeError, match="BuilderFlag.FP16 is not in the table"):
        api.value("BuilderFlag.FP16")


def test_missing_tensorrt_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(PpclError) as caught:
        need("tensorrt_that_is_not_there", extra="tensorrt", left="the ONNX files stay in ENGINES")
    assert str(caught.value) == (
        'tensorrt_that_is_not_there is not installed: pip install "ppcl-fx[tensorrt]"; the ONNX files stay in ENGINES'
    )


# With TensorRT and a GPU there is nothing to refuse.
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None and tensorrt_api.gpu_name() is not None,
    reason="there are TensorRT and a GPU here",
)
def test_load_tensorrt_says_what_stays() -> None:
    with pytest.raises(
        PpclError, match=r'pip install "ppcl-fx\[tensorrt\]".*the ONNX files stay in ENGINES'
    ) as caught:
        load_tensorrt("the ONNX files stay in ENGINES")
    assert "\n" not in str(caught.value)


def test_profile_ranges_are_ordered() -> None:
    with pytest.raises(ValidationError, match="min <= opt <= max"):
        Range(min=4, opt=2, max=8)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Range(min=0, opt=2, max=8)


def test_profile_gives_each_input_three_shapes() -> None:
    inputs = [
        Port(name="x", dtype="bfloat16", shape=["batch", "x_1", 16]),
        Port(name="t", dtype="bfloat16", shape=["batch"]),
    ]
    profile = default_profile(inputs, {"batch": 2, "x_1": 64, "unused": 5})
    assert profile.sizes == {"batch": Range(min=1, opt=2, max=4), "x_1": Range(min=1, opt=64, max=256)}
    assert _shapes(inputs[0], profile) == ((1, 1, 16), (2, 64, 16), (4, 256, 16))
    assert _shapes(inputs[1], profile) == ((1,), (2,), (4,))


def test_profile_without_a_size_is_refused_by_name() -> None:
    port = Port(name="x", dtype="bfloat16", shape=["batch", "x_1", 16])
    with pytest.raises(
        PpclError, match=r"no range for the size 'batch' of the input 'x' \(did you mean 'bathc'\?\)"
    ):
        _shapes(port, Profile(sizes={"bathc": Range(min=1, opt=1, max=1), "x_1": Range(min=1, opt=1, max=1)}))


def test_engine_profile_reads_from_json() -> None:
    text = json.dumps({"sizes": {"batch": {"min": 1, "opt": 2, "max": 4}}, "level": 3})
    assert Profile.model_validate_json(text).sizes["batch"].opt == 2
    with pytest.raises(ValidationError):
        Profile.model_validate_json('{"sizes": {}, "precision": "fp16"}')


def test_stub_folder_is_not_left_on_the_path() -> None:
    assert "tensorrt_bindings" not in sys.modules
    assert not any("stubs" in part for part in map(str, [Path(p) for p in sys.path]))
