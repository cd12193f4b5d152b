"""A sign for pipelines that a model has LoRAs: they look for PEFT's layers among a transformer's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ppcl_fx.lora.methods import LoraModel

NAME = "lora"
"""Under which name the sign is a child of the model."""


def mark(model: LoraModel) -> None:
    """Put the sign on a model that has LoRAs, and take it off one that has none.

    It is a module without weights, of PEFT's class. Through it ``pipe.get_active_adapters``, ``pipe.unfuse_lora`` and
    ``pipe.fused_loras`` find what they look for.
    """
    model._modules.pop(NAME, None)
    if not model.peft_config:
        return
    from peft.tuners import tuners_utils

    base: Any = tuners_utils.BaseTunerLayer

    class LoraMark(nn.Module, base):  # type: ignore[misc]
        """Speaks for all linear layers of the model at once."""

        @property
        def active_adapters(self) -> list[str]:
            return model.active_adapters()

        @property
        def merged_adapters(self) -> list[str]:
            return model.active_adapters() if model.lora_is_fused else []

        @property
        def lora_A(self) -> dict[str, Any]:
            """No layer of its own to move to another device."""
            return {}

        def unmerge(self) -> None:
            """Do what ``pipe.unfuse_lora`` asks of each layer."""
            model.unfuse_lora()

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            """Refuse: adapters are loaded with ``load_lora_adapter``."""
            raise NotImplementedError

    model.add_module(NAME, LoraMark())
