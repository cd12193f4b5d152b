"""Everything the package uses of TensorRT, read out of its source, exists in NVIDIA's compiled bindings."""

from __future__ import annotations

import ast
import importlib.util
import json
import re

import pytest

from ppcl_fx.export.tensorrt_api import version_numbers
from tests.export.trt_bindings import ROOT, Use, all_uses, fitting, in_bindings, look, signatures, uses_in

pytestmark = pytest.mark.slow

USES = all_uses()
METHODS = [use for use in USES if use.how in ("make", "call")]
PROPERTIES = [use for use in USES if use.how in ("get", "set")]
NAMES = [use for use in USES if use.how in ("value", "has")]
CALLBACKS = [use for use in USES if use.how == "implement"]
RTX_ALONE = re.compile(
    r"ComputeCapability\.|CudaGraphStrategy\.|DynamicShapesKernelSpecializationStrategy\.|EngineValidity\.|"
    r"EngineInvalidityDiagnostics\.|IRuntimeCache\.|IRuntimeConfig\.|ICudaEngine\.create_runtime_config|"
    r"IBuilderConfig\.(num_compute_capabilities|set_compute_capability)|Runtime\.get_engine_validity"
)
"""What TensorRT for RTX has and TensorRT lacks, or does not do alike."""


def kinds(use: Use) -> list[str]:
    """The libraries that something is used of."""
    rtx = importlib.util.find_spec("tensorrt_rtx_bindings") is not None  # not on macOS
    alone = RTX_ALONE.match(use.path) or "runtime_config" in use.keywords
    return [*([] if alone else ["tensorrt"]), *(["rtx"] if rtx else [])]


def names(uses: list[Use]) -> list[str]:
    return [f"{use} {use.where}" for use in uses]


def test_the_source_is_read() -> None:
    assert {use.path for use in METHODS} >= {"Builder", "Builder.create_network", "OnnxParserRefitter.refit_from_file"}
    assert {use.path for use in NAMES} >= {"BuilderFlag.REFIT_IDENTICAL", "BuilderFlag.STRIP_PLAN"}
    assert {use.path for use in CALLBACKS} == {"ILogger", "IProgressMonitor", "IStreamWriter"}
    assert len({str(use) for use in USES}) > 40


def test_a_use_that_cannot_be_read_is_an_error() -> None:
    assert uses_in('self._api.call("A.b", x, c=1)', "f") == [Use("call", "A.b", ("c",), "f:1")]
    assert uses_in('profile.get("x")', "f") == []
    with pytest.raises(AssertionError, match="f:1: no plain name"):
        uses_in("api.value(name)", "f")
    with pytest.raises(AssertionError, match="f:1: keywords are not spelt out"):
        uses_in('api.call("A.b", x, **more)', "f")


def test_nothing_else_touches_tensorrt() -> None:
    for path in sorted((ROOT / "export").rglob("*.py")) + sorted((ROOT / "ppcl_fx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            libraries = {"tensorrt", "tensorrt_bindings", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"}
            assert not libraries & {name.split(".")[0] for name in imported}, path
            around = isinstance(node, ast.Attribute) and node.attr == "module" and isinstance(node.value, ast.Name)
            assert not (around and node.value.id == "api"), f"{path}: goes around the Api"


def test_bindings_tell_what_is_missing() -> None:
    found = look(["NoSuchThing", "Builder.no_such", "BuilderFlag.FP16", "__version__"])
    assert found["NoSuchThing"] is None
    assert found["Builder.no_such"] is None
    if version_numbers(found["__version__"]["text"]) >= (11,):
        assert found["BuilderFlag.FP16"] is None  # TensorRT 11 is strongly typed only


def test_signatures_are_read() -> None:
    assert fitting("Builder.create_network", ("flags",)) is not None
    assert fitting("Builder.create_network", ()) is not None
    assert fitting("Builder.create_network", ("flag",)) is None
    assert fitting("Refitter", ("engine",)) is None
    assert len(signatures("Runtime.deserialize_cuda_engine")) >= 1


@pytest.mark.parametrize("use", METHODS, ids=names(METHODS))
def test_calls_exist_with_their_keywords(use: Use) -> None:
    if use.path == "Builder.build_serialized_network_to_stream" and look([use.path])[use.path] is None:
        # Versions before 11.4 have no streamed serialisation; our code asks for it before it calls it.
        pytest.skip("only asked for where it is there")
    for kind in kinds(use):
        assert look([use.path], kind)[use.path] is not None, f"{kind} has no {use.path}: {use.where}"
        taken = signatures(use.path, kind)
        assert fitting(use.path, use.keywords, kind), f"{use.where}: {use.path} takes {taken}, not {use.keywords}"


@pytest.mark.parametrize("use", NAMES, ids=names(NAMES))
def test_values_exist(use: Use) -> None:
    newest = version_numbers(look(["__version__"])["__version__"]["text"]) >= (11, 4)
    for kind in kinds(use):
        assert look([use.path], kind)[use.path] is not None or (use.how == "has" and not newest), use.where


@pytest.mark.parametrize("use", PROPERTIES, ids=names(PROPERTIES))
def test_properties_exist(use: Use) -> None:
    for kind in kinds(use):
        found = look([use.path], kind)[use.path]
        assert found is not None and found["type"] == "property", use.where


@pytest.mark.parametrize("use", CALLBACKS, ids=names(CALLBACKS))
def test_callbacks_exist(use: Use) -> None:
    if use.path == "IStreamWriter" and look([use.path])[use.path] is None:
        # The same: no stream writer is made where TensorRT has no such class.
        pytest.skip("only made where it is there")
    for name in (f"{use.path}.{method}" for method in use.keywords):
        for kind in kinds(use):
            assert look([name], kind)[name] is not None, f"{name}: {use.where}"


REAL = """
import io, json
import tensorrt_bindings as trt
from ppcl_fx.export.tensorrt.compiling import _Sink, network_flags
from ppcl_fx.export.tensorrt.monitor import Messages, Monitor
from ppcl_fx.export.tensorrt_api import Api, Gpu, version_numbers

api, seen, found = Api(trt, Gpu("none", "0.0", "0.0")), [], {}
class Config:
    pass
config = Config()
monitor = Monitor(lambda done, total, phase: seen.append((done, phase)))
callback = monitor.attach(api, config)
callback.phase_start("all", None, 2)
going = callback.step_complete("all", 0)
monitor.stop.set()
found["monitor"] = [isinstance(callback, trt.IProgressMonitor), config.progress_monitor is callback, going,
                    callback.step_complete("all", 1), seen]
messages = Messages(api)
logger = messages.logger
logger.log(trt.ILogger.Severity.WARNING, "not kept")
logger.log(trt.ILogger.Severity.ERROR, "kept")
found["logger"] = [isinstance(logger, trt.ILogger), messages.why()]
if api.has("IStreamWriter"):
    file = io.BytesIO()
    writer = api.implement("IStreamWriter", write=_Sink(file).write)
    found["writer"] = [isinstance(writer, trt.IStreamWriter), writer.write(b"abc"), file.getvalue().decode()]
found["flags"] = network_flags(api)
found["version"] = version_numbers(api.version)
print(json.dumps(found))
"""


def test_our_callbacks_are_nvidias_classes() -> None:
    found = json.loads(in_bindings(REAL))
    assert found["monitor"] == [True, True, True, False, [[0, "all"], [50, "all"], [100, "all"]]]
    assert found["logger"] == [True, " (kept)"]
    assert found.get("writer", [True, 3, "abc"]) == [True, 3, "abc"]
    assert found["flags"] == (1 if found["version"][0] >= 11 else 2)
