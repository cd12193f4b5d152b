"""Sources: what MODEL may be on the command line, checked before anything of it is loaded.

A source is a diffusers folder (a pipeline or a bare transformer), a repository on the Hugging Face hub, or ``shapes``,
the model that ships with the package. Weights are read from safetensors only, classes come from the installed
libraries by their names, and no code from a folder is run.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from ppcl_fx.errors import PpclError, foreign, near
from ppcl_fx.io.files import check_links, inside, own_file, read_json
from ppcl_fx.io.reading import check_model_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ppcl_fx.tracing.meta_model import Checkpoint

SHAPES = "shapes"
LIBRARIES = ("diffusers", "transformers", "ppcl_fx.shapes.words")
"""Where the classes of a pipeline's components may come from."""
STUDENT_FILES = ("ppcl.json", "plan.json", "finetuned.json")
"""Files that tell a folder which `ppcl_fx` saved."""
RELEASED_LISTS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")
"""Lists of block numbers in ``config.json`` that tell a checkpoint of the released layout."""
AGAIN = "download or save it again"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Index(BaseModel):
    """``model_index.json``, or the ``config.json`` of a model: a class and whatever else."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]


@dataclass(frozen=True)
class Source:
    """A model that was found and may be loaded: what the user typed, where its files lie, and whether they are a whole
    pipeline or a transformer alone.
    """

    name: str
    kind: Literal["pipeline", "transformer"]
    folder: Path

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:
        """Load the pipeline with its weights in `dtype` (float32 when None)."""
        from ppcl_fx.formats.components import check_component, is_model, load_model

        if self.kind != "pipeline":
            raise PpclError(f"{self.name}: a transformer without its pipeline; name the pipeline's folder")
        found = _pipeline_class(self.folder / "model_index.json")
        transformer = self.transformer(dtype)
        released = is_released(self.folder)
        # diffusers wants a class of its own here, and takes any module afterwards.
        loaded = {"transformer": None if released else transformer}
        for name, kind in self.parts().items():
            if is_model(kind):
                loaded[name] = load_model(kind, self.folder / name, _options(dtype))
            else:
                check_component(kind, self.folder / name)
        with foreign(f"{self.name}: cannot be loaded", AGAIN):
            pipeline = found.from_pretrained(self.folder, **loaded, **_options(dtype))
        if released:
            pipeline.register_modules(transformer=transformer)
        return pipeline

    def parts(self) -> dict[str, type[Any]]:
        """Return the parts of a pipeline beside its transformer, with their classes; nothing is loaded."""
        path = self.folder / "model_index.json"
        named = _components(path) if self.kind == "pipeline" else {}
        return {name: _class(*place, path) for name, place in named.items() if name != "transformer"}

    def transformer(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the transformer alone, with its weights in `dtype` (float32 when None), in evaluation mode."""
        folder = transformer_folder(self.folder)
        if is_released(folder):
            import torch

            from ppcl_fx.formats.released import load

            return load(folder, dtype=dtype or torch.float32)
        from ppcl_fx.formats.components import load_model

        self.checkpoint(dtype)  # names and sizes fit, before anything is built
        return load_model(transformer_class(folder / "config.json"), folder, _options(dtype))

    def checkpoint(self, dtype: torch.dtype | None = None) -> Checkpoint:
        """Open the transformer without loading it: weights are read one by one, and used in `dtype` or as stored."""
        from ppcl_fx.io.build_bounds import Room
        from ppcl_fx.io.shards import Shards
        from ppcl_fx.ir.dtypes import kept_in_float32
        from ppcl_fx.tracing.meta_model import Checkpoint, skeleton

        path = transformer_folder(self.folder) / "config.json"
        found, shards = transformer_class(path), Shards.open(path.parent)
        wanted = dtype or shards.dtype(kept_in_float32(found))
        model = skeleton(found, _read(path), wanted, room=Room.of(shards.shapes), where=str(path))
        shards.check(model)
        return Checkpoint(model, shards)


def open_source(name: str) -> Source:
    """Find a model (a folder, a hub repository, ``shapes``) and check what its files name, or raise PpclError."""
    check_source(name)
    folder = Path(name)
    if name != SHAPES:
        return _open_folder(name, folder if folder.is_dir() else _download(name))
    from ppcl_fx.shapes import weights_folder

    folder = weights_folder()
    if not (folder / "model_index.json").is_file():
        raise PpclError(f"{SHAPES}: its weights are not in {folder}; install the package again")
    return _open_folder(name, folder)


def check_source(name: str) -> None:
    """Raise `PpclError` unless a model may be there, by its name alone and with no import: a folder, or a hub id."""
    folder = Path(name)
    if name == SHAPES or folder.is_dir():
        return
    if folder.exists():
        raise PpclError(f"{name}: is a file; give the diffusers folder that it is in")
    # RUN/studnet with a folder RUN is a slip of the finger, not an organisation.
    if HUB_NAME.fullmatch(name) and not folder.parent.is_dir():
        return
    beside = [str(folder.parent / p.name) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    guess = near(str(folder), [*beside, SHAPES])
    raise PpclError(f"{name}: no such model{guess}; give a diffusers folder, a hub id (org/name) or {SHAPES!r}")


def holds_config(folder: Path) -> bool:
    """Tell whether a folder is one of diffusers' layout, by its files' names alone."""
    return any((folder / name).exists() for name in ("config.json", "model_index.json"))


def is_released(folder: Path) -> bool:
    """Tell whether a folder, or its ``transformer`` folder, is of the released layout (`ppcl_fx.formats.released`)."""
    folder = transformer_folder(folder)
    path = folder / "config.json"
    return path.is_file() and any(name in _read(path) for name in RELEASED_LISTS)


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the transformer: ``folder/transformer`` where `folder` is a whole pipeline's."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def _open_folder(name: str, folder: Path) -> Source:
    if any((folder / student).is_file() for student in STUDENT_FILES):
        raise PpclError(f"{name}: a model that ppcl-fx saved, not a teacher; open it with ppcl_fx.load")
    check_model_folder(folder)
    index = folder / "model_index.json"
    if index.is_file():
        _pipeline_class(index)
        _refuse_code(folder)
        components = _components(index)
        for part, place in components.items():
            _refuse_code(inside(folder, part))
            check_links(folder / part)
            if part == "transformer":
                transformer_class(folder / part / "config.json")
            else:
                _class(*place, index)
        if "transformer" not in components:
            raise PpclError(f"{index}: this pipeline has no transformer; give one of a diffusion transformer")
        return Source(name, "pipeline", folder)
    if (folder / "config.json").is_file():
        _refuse_code(folder)
        check_links(folder, ("*.json", "*.safetensors"))
        transformer_class(folder / "config.json")
        return Source(name, "transformer", folder)
    raise PpclError(f"{name}: holds neither model_index.json nor config.json; give a diffusers folder")


def _components(path: Path) -> dict[str, tuple[str, str]]:
    """Return the parts that a ``model_index.json`` names, with their library and class; those left empty are not."""
    found = {}
    for name, value in _read(path).items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        match value:
            case [None, None]:
                continue
            case [str(library), str(class_name)]:
                if library not in LIBRARIES:
                    raise _code(path, f"{name!r} is of the module {library!r}")
                if Path(name).name != name:
                    raise PpclError(f"{path}: {name!r} is no name of a folder beside it; download it again")
                found[name] = (library, class_name)
            case _:
                raise PpclError(f"{path}: {name!r} is {value!r}, not a library and a class; download it again")
    return found


def _refuse_code(folder: Path) -> None:
    for path in sorted(folder.glob("*.py")):
        raise _code(path, "a Python file in a model folder")


def _code(path: Path, what: str) -> PpclError:
    allowed = ", ".join(LIBRARIES)
    return PpclError(f"{path}: {what}; code from a model is never run, take a model that needs only {allowed}")


def _read(path: Path) -> dict[str, JsonValue]:
    values = read_json(own_file(path), _Index).__pydantic_extra__
    for name in ("trust_remote_code", "custom_pipeline", "auto_map"):
        if values.get(name):
            raise _code(path, f"it asks for {name}")
    return values


def _pipeline_class(path: Path) -> Any:
    name = _read(path).get("_class_name")
    if isinstance(name, list):
        raise _code(path, f"the pipeline is code of its own, {name!r}")
    if name == "ShapesPipeline":
        return _class("ppcl_fx.shapes.pipeline", name, path)
    return _of_kind("DiffusionPipeline", name, path, "a pipeline; give a pipeline's folder")


def transformer_class(path: Path) -> Any:
    """Return the class of diffusers that a transformer's ``config.json`` names; its weights must not be quantised."""
    values = _read(path)
    for entry in ("quantization_config", "compression_config"):
        if values.get(entry):
            how = values[entry]
            method = how.get("quant_method") if isinstance(how, dict) else None
            raise PpclError(
                f"{path}: {entry} says that the weights are quantised ({method or 'unknown method'}), and only plain "
                "weights can be pruned; give the model that it was quantised from"
            )
    return _of_kind("ModelMixin", values.get("_class_name"), path, "a model; give a transformer's folder")


def diffusers_class(name: str) -> Any:
    """Return the model class `name` of diffusers, for a configuration that was checked before."""
    return _class("diffusers", name, Path("config.json"))


def _of_kind(base: str, name: JsonValue, path: Path, wanted: str) -> Any:
    found = _class("diffusers", name, path)
    if not issubclass(found, _class("diffusers", base, path)):
        raise PpclError(f"{path}: {name} is not {wanted}")
    return found


def _class(library: str, name: JsonValue, path: Path) -> Any:
    """Return a class of an installed library; its name comes from a file, the library does not."""
    if not isinstance(name, str):
        raise PpclError(f"{path}: has no _class_name; give a diffusers folder")
    module = importlib.import_module(library)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        guess = near(name, dir(module))
        raise PpclError(f"{path}: {library} has no class {name!r}{guess}; update it, or mend the name")
    return found


def _options(dtype: torch.dtype | None) -> dict[str, Any]:
    import torch

    return {"dtype": dtype or torch.float32, "use_safetensors": True, "local_files_only": True}


def _download(name: str) -> Path:
    """Fetch a repository's JSON files first, check them, and then what the pipeline or the transformer needs."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json"]))
        # A pipeline's weights are in its components' folders; what lies beside them is the same once more.
        parts = [f"{part.name}/*" for part in folder.iterdir() if part.is_dir()]
        wanted = parts if _open_folder(name, folder).kind == "pipeline" else ["*.safetensors"]
        ignore = ["*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.onnx*", "*.msgpack", "*.h5"]
        return Path(snapshot_download(name, allow_patterns=["*.json", *wanted], ignore_patterns=ignore))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PpclError(
            f"{name}: cannot be downloaded from the hub ({reason}); check the name and the network, or give a folder"
        ) from error
