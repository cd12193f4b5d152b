"""The parts of a pipeline on disk: models with weights, and what is configured by numbers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ppcl_fx.errors import PpclError, foreign
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.configurations import check_config, check_numbers
from ppcl_fx.io.reading import JSON_BYTES, parse_json, read_bytes
from ppcl_fx.io.shards import STEM, Shards, check_weight
from ppcl_fx.tracing.meta_model import skeleton

AGAIN = "download or save it again"


def is_model(kind: type[Any]) -> bool:
    """Tell whether a part of a pipeline is a model with weights."""
    return issubclass(kind, (ModelMixin, PreTrainedModel))


def open_weights(kind: Any, folder: Path) -> Shards:
    """Open the weights of a model of the class `kind`, of diffusers or transformers, and build it without them.

    It is built within what the headers of the weights say, so a number too much costs neither memory nor time.
    PpclError where a file is missing or damaged, or the class refuses the configuration.
    """
    path = folder / "config.json"
    is_diffusers = issubclass(kind, ModelMixin)
    shards = Shards.open(folder, STEM if is_diffusers else "model")
    room = Room.of(shards.shapes)
    if is_diffusers:
        skeleton(kind, _object(path), torch.float32, room=room, where=str(path))
        return shards
    check_numbers(_object(path), str(path))
    with foreign(f"{path}: {kind.__name__} refuses this configuration", "mend config.json"):
        config = kind.config_class.from_pretrained(folder)
        with room.kept(str(path)), torch.device("meta"):
            kind(config)
    return shards


def load_model(kind: Any, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """Load a model of diffusers or transformers, in evaluation mode; nothing in it is left random, or is not finite.

    PpclError as `open_weights`, or the weights do not fit the class. `options` are those of `from_pretrained`.
    """
    open_weights(kind, folder)
    with foreign(f"{folder}: cannot be loaded", AGAIN):
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    # The libraries only log what follows: they leave missing weights random, and drop what is too much.
    extra = info["unexpected_keys"]
    if not issubclass(kind, ModelMixin):
        # Checkpoints of transformers hold heads and buffers of their makers; a block too much is another thing.
        alike = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
        extra = [name for name in extra if re.sub(r"\d+", "#", name) in alike]
    for problem, found in {**info, "unexpected_keys": extra}.items():
        if problem in ("missing_keys", "unexpected_keys", "mismatched_keys") and found:
            what = f"{problem.replace('_', ' ')}, the first is {sorted(map(str, found))[0]!r}"
            raise PpclError(f"{folder}: the weights do not fit {kind.__name__} ({what}); download them again")
    loaded: nn.Module = model.eval()
    for name, parameter in loaded.named_parameters():
        check_weight(parameter, name, folder)
    return loaded


def check_component(kind: Any, folder: Path) -> None:
    """Check, by `check_config`, the configuration of a part without weights: a scheduler, an image processor."""
    name = getattr(kind, "config_name", None)
    if isinstance(name, str) and (folder / name).is_file():
        check_config(kind, _object(folder / name), str(folder / name))


def _object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds. Configurations of schedulers may hold infinities."""
    try:
        found = parse_json(read_bytes(path, JSON_BYTES), finite=False)
    except ValueError as error:
        raise PpclError(f"{path}: not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(found, dict):
        raise PpclError(f"{path}: holds no JSON object; {AGAIN}")
    return found
