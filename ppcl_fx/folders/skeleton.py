"""Models without weights: parameters on the meta device, everything else as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ppcl_fx.errors import PpclError


def build(kind: type[nn.Module], config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a diffusers model whose parameters have shapes and no values.

    Tables that a model computes when it is built (frequencies of rotary embeddings) are real, so that a trace of it
    computes what a trace of the model with its weights would.

    Args:
        kind: the model's class.
        config: its configuration; names with an underscore in front are left out.
        dtype: of the floating-point parameters.

    Raises:
        PpclError: the class refuses the configuration.
    """
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with weights_on_meta():
            model: nn.Module = kind.from_config(plain)  # type: ignore[attr-defined]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PpclError(f"{kind.__name__} refuses this configuration ({reason}); mend config.json") from error
    # Not diffusers' own `to`, which warns of modules to keep in float32 even where there are none.
    return nn.Module.to(model, dtype).eval()


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Put the parameters of modules that are built in this block on the meta device, and no other tensor."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
