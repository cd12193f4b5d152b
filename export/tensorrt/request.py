"""What is to be built from the graphs of a folder: written where they are exported, read where they are built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import read_graph
from ppcl_fx.export.tensorrt.profiles import Profile, Spec, check_spec, default_profile, resolve
from ppcl_fx.io.files import inside, read_json, write_json
from ppcl_fx.io.options import Config, Flag

REQUEST = "build.json"


class BuildConfig(Config):
    """Every option of ``ppcl-fx build``, and the file ``build.json`` of an exported folder.

    Attributes:
        spec: the profiles, as they were asked for.
        options: how to build.
        example: the sizes of the example that the graphs were exported with, by the names of the open sizes.
    """

    version: Annotated[Literal[1], Flag(hidden=True)] = 1
    kind: Annotated[Literal["tensorrt-build"], Flag(hidden=True)] = "tensorrt-build"
    spec: Spec = Field(Spec(), description="the sizes that engines take")
    options: BuildOptions = Field(BuildOptions(), description="how they are built")
    example: Annotated[dict[str, int], Flag(hidden=True)] = Field({}, description="sizes of the example")

    def over(self, given: Mapping[str, Any]) -> BuildConfig:
        """Return these options with those that the command line gives in their place.

        Raises:
            PpclError: one of them is wrong, or they do not fit each other.
        """
        spec, options = given.get("spec", {}), given.get("options", {})
        if {"shapes", "tokens"} & spec.keys():
            spec = {"shapes": "", "tokens": "", **spec}
        made = BuildConfig(
            spec=Spec(**self.spec.model_dump() | spec),
            options=BuildOptions(**self.options.model_dump() | options),
            example=self.example,
        )
        check_spec(made.spec)
        if made.options.stripped and options.get("refit") == "none":
            raise PpclError("--stripped --refit none: weights must come back somehow; leave --refit out")
        return made

    def profiles(self, onnx: Path) -> list[Profile]:
        """Return the profiles for one graph: those asked for, or one around the example.

        Raises:
            PpclError: as `read_graph`, and as `ppcl_fx.export.tensorrt.profiles.resolve`.
        """
        spec, graph = self.spec, read_graph(onnx)
        if spec.shapes or spec.tokens or spec.batch or spec.text or spec.sizes or not self.example:
            return resolve(spec, graph.inputs, graph.outputs, str(onnx))
        return [default_profile(graph.inputs, self.example)]


def write_request(folder: Path, config: BuildConfig) -> None:
    """Write what is to be built into an exported folder."""
    write_json(folder / REQUEST, config)


def read_request(folder: Path) -> BuildConfig:
    """Return what is to be built in an exported folder; nothing is known where no file says so.

    Raises:
        PpclError: the folder is missing, or the file is damaged.
    """
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx export' wrote")
    return read_json(inside(folder, REQUEST), BuildConfig) if (folder / REQUEST).is_file() else BuildConfig()
