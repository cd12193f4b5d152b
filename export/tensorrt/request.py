"""What is to be built from the graphs of a folder: written where they are exported, read where they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ppcl_fx.errors import PpclError
from ppcl_fx.export.tensorrt.options import BuildOptions
from ppcl_fx.export.tensorrt.places import REQUEST, GraphFile
from ppcl_fx.export.tensorrt.profiles import Profile, Spec, default_profile, resolve
from ppcl_fx.files import inside, read_json, write_json


class BuildRequest(BaseModel):
    """The file ``build.json`` of an exported folder.

    Attributes:
        spec: the profiles, as they were asked for.
        options: how to build.
        example: the sizes of the example that the graphs were exported with, by the names of the open sizes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    kind: Literal["tensorrt-build"] = "tensorrt-build"
    spec: Spec = Field(default_factory=Spec)
    options: BuildOptions = Field(default_factory=BuildOptions)
    example: dict[str, int] = Field(default_factory=dict)

    def profiles(self, graph: GraphFile, file: str) -> list[Profile]:
        """Return the profiles for one graph: those asked for, or one around the example.

        Args:
            graph: the graph.
            file: its name, for messages.

        Raises:
            PpclError: as `ppcl_fx.export.tensorrt.resolve`.
        """
        spec = self.spec
        if spec.shapes or spec.tokens or spec.batch or spec.text or spec.sizes or not self.example:
            return resolve(spec, graph.inputs, graph.outputs, file)
        return [default_profile(graph.inputs, self.example)]


def write_request(folder: Path, request: BuildRequest) -> None:
    """Write what is to be built into an exported folder.

    Raises:
        PpclError: the place cannot be written.
    """
    write_json(folder / REQUEST, request)


def read_request(folder: Path) -> BuildRequest:
    """Return what is to be built in an exported folder; nothing is known where no file says so.

    Raises:
        PpclError: the folder is missing, or the file is damaged.
    """
    if not folder.is_dir():
        raise PpclError(f"{folder}: no such folder; give what 'ppcl-fx export' wrote")
    return read_json(inside(folder, REQUEST), BuildRequest) if (folder / REQUEST).is_file() else BuildRequest()
