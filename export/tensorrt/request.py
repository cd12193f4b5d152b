"""The graphs of a folder, and what is to be built from them: written by an export, read where engines are built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, JsonValue

from ppcl_fx.errors import PpclError
from ppcl_fx.export.extras import need
from ppcl_fx.export.store.names import ratio_of, typed_graph_path
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.profiles import (
    Profile,
    Spec,
    check_agreement,
    check_spec,
    default_profile,
    resolve,
)
from ppcl_fx.export.tensorrt_api import Kind
from ppcl_fx.io.files import Record, inside, own_file, read_json, write_json
from ppcl_fx.io.options import Config, Flag, flag_of
from ppcl_fx.schema.plan import Plan

if TYPE_CHECKING:
    from ppcl_fx.export.store.manifest import Port

REQUEST = "build.json"
FEW_BITS = ("int4", "int8", "float8e4m3fn")
"""Types that weights are stored in and layers do not compute in."""


def find_graphs(folder: Path) -> dict[str, Path]:
    """Return the graphs that engines are built from, ``keep-0.7.onnx`` or ``keep-0.7.bf16.onnx`` by the name
    ``keep-0.7``, the largest ratio first.
    """
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx export' wrote")
    ratios = {graph: ratio for graph in sorted(folder.glob("*.onnx")) if (ratio := ratio_of(graph)) is not None}
    if not ratios:
        raise PpclError(f"{folder}: no exported graph (keep-0.7.onnx, for example); give what 'ppcl-fx export' wrote")
    found = {}
    for graph in sorted(ratios, key=lambda graph: -ratios[graph]):
        typed = typed_graph_path(graph)
        found[graph.stem] = own_file(typed if typed.is_file() else graph)
    return found


class GraphFile(NamedTuple):
    """What an ONNX file says of itself: the type is that of most weights, and ``weights`` are the files that hold them,
    relative to it; none where they are in the file itself.
    """

    inputs: list[Port]
    outputs: list[Port]
    dtype: str
    weights: tuple[str, ...]


def load_onnx(onnx: Path) -> Any:
    """Return an ONNX file as an `onnx_ir.Model`, weights outside of it unread; `PpclError` where it is damaged."""
    ir = need("onnx_ir")
    try:
        return ir.load(onnx)
    except Exception as error:  # noqa: BLE001  protobuf's errors and onnx_ir's have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PpclError(f"{onnx}: damaged, or not an ONNX file ({reason}); export the model again") from None


def read_graph(onnx: Path) -> GraphFile:
    """Read an ONNX file without its weights, which must be there, and in its folder."""
    from ppcl_fx.export.onnx.writer import ports

    if not onnx.is_file():
        raise PpclError(f"{onnx}: no such file; export the model again")
    graph = load_onnx(onnx).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype.name.lower() not in FEW_BITS:
            counts[tensor.dtype.name.lower()] += tensor.size
    outside = [tensor for tensor in tensors if isinstance(tensor, need("onnx_ir").ExternalTensor)]
    weights = tuple(dict.fromkeys(str(tensor.location) for tensor in outside))
    for name in weights:
        if not inside(onnx.parent, name).is_file():
            raise PpclError(f"{onnx.parent / name}: no such file, and {onnx.name} has its weights there; export again")
    dtype = counts.most_common(1)[0][0] if counts else "float"
    return GraphFile(ports(graph.inputs), ports(graph.outputs), dtype, weights)


class Origin(Record, extra="ignore"):
    """What is read of the JSON beside an ONNX file: which mixture it is, and how well the graph was checked."""

    keep: float | None = None
    students: list[str] = Field([])
    plan: Plan | None = None
    parity: JsonValue = None


class EngineConfig(Config):
    """Which engines: the options that ``ppcl-fx build`` and an export have in common."""

    spec: Spec = Field(Spec(), description="the sizes that engines take")
    options: BuildOptions = Field(BuildOptions(), description="how they are built")

    def asked(self) -> list[str]:
        """Return the flags of what somebody gave."""
        parts = (self.spec, self.options)
        return [flag_of(type(part), name) for part in parts for name in part.given(type(part).model_fields)]

    def request(self, library: Kind, example: Mapping[str, int]) -> BuildConfig:
        """Return what is to be built with a library, by the sizes of an example."""
        return BuildConfig(spec=self.spec, options=self.options, library=library, example=dict(example))


class BuildConfig(EngineConfig):
    """Every option of ``ppcl-fx build``, and the file ``build.json`` of an exported folder.

    ``example`` has the sizes of the call that the graphs were exported with, by the names of the open sizes.
    """

    version: Annotated[Literal[1], Flag(hidden=True)] = 1
    kind: Annotated[Literal["tensorrt-build"], Flag(hidden=True)] = "tensorrt-build"
    library: Annotated[Kind, Flag("--for", metavar="NAME")] = Field(
        "tensorrt",
        description="'tensorrt', for the GPU of this machine; or 'rtx', TensorRT for RTX, which needs no GPU to build. "
        "What build.json says if left out",
    )
    example: Annotated[dict[str, int], Flag(hidden=True)] = Field({}, description="sizes of the example")

    def over(self, given: Mapping[str, Any]) -> BuildConfig:
        """Return these options with those that the command line gives in their place; `PpclError` for wrong ones."""
        spec, options = given.get("spec", {}), given.get("options", {})
        if {"shapes", "tokens"} & spec.keys():
            spec = {"shapes": "", "tokens": "", **spec}
        made = BuildConfig(
            spec=Spec(**self.spec.model_dump() | spec),
            options=BuildOptions(**self.options.model_dump() | options),
            library=given.get("library", self.library),
            example=self.example,
        )
        check_spec(made.spec)
        made.options.check(made.library)
        if made.options.stripped and options.get("refit") == "none":
            raise PpclError("--stripped --refit none: weights must come back somehow; leave --refit out")
        return made

    def save(self, folder: Path) -> None:
        """Write what is to be built into an exported folder."""
        write_json(folder / REQUEST, self)

    def profiles(self, onnx: Path) -> list[Profile]:
        """Return the profiles for one graph: those asked for, or one around the example."""
        spec, graph = self.spec, read_graph(onnx)
        if spec.shapes or spec.tokens or spec.batch or spec.text or spec.sizes or not self.example:
            found = resolve(spec, graph.inputs, graph.outputs, str(onnx))
        else:
            found = [default_profile(graph.inputs, self.example)]
        check_agreement(onnx, found)
        return found


def read_request(folder: Path) -> BuildConfig:
    """Return what is to be built in an exported folder; nothing is known where no file says so."""
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx export' wrote")
    return read_json(inside(folder, REQUEST), BuildConfig) if (folder / REQUEST).is_file() else BuildConfig()
