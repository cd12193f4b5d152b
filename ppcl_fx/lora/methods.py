"""The LoRA methods that diffusers' pipelines call on their transformer, for a pluggable model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.lora.adapters import Adapters, LoraReport
from ppcl_fx.lora.keys import Model, read_lora
from ppcl_fx.lora.layers import need_peft

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.schema.plan import Plan

log = logging.getLogger("ppcl_fx.lora")

MARK = "lora"
"""The name of the child that says to pipelines that a model has LoRAs."""


class LoraModel(nn.Module):
    """What a pluggable model is for ``pipe.load_lora_weights``, ``pipe.set_adapters``, ``pipe.unload_lora_weights``...

    A LoRA trained on the teacher is loaded by the teacher's block numbers. All of it is kept, so every mixture is
    right; what the present one has no place for is dropped and counted. See `ppcl_fx.lora` for how.
    """

    graph: GraphModule
    students: tuple[str, ...]
    _plan: Plan
    _weights_written: Callable[[], None]
    """Follows what was written into weights: a mixture may hold copies of rows of them."""
    _view: Callable[[frozenset[str], GraphModule], GraphModule]
    lora_on_students: bool = True
    """Whether a student block takes the LoRA layers of the block that it started from; read when a LoRA is loaded."""

    @property
    def _adapters(self) -> Adapters:
        # In the plain dictionary: it is no submodule, and it must not be found in a state dict.
        if "_lora" not in self.__dict__:
            self.__dict__["_lora"] = Adapters(self.graph, self._plan)
        adapters = self.__dict__["_lora"]
        assert isinstance(adapters, Adapters)
        return adapters

    @property
    def peft_config(self) -> dict[str, Any]:
        """The loaded LoRAs by name; pipelines read the names."""
        return dict(self._adapters.loaded)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, torch.Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_students: bool | None = None,
        **ignored: Any,
    ) -> LoraReport | None:
        """Load a LoRA that was trained on the teacher, and make it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder with one, or tensors by name, in the
                layout of diffusers or PEFT, or in one that diffusers converts for this transformer. From the hub:
                ``pipe.load_lora_weights``.
            prefix: what stands before the names that are for the transformer.
            hotswap: put it in the place of the LoRA of that name.
            adapter_name: its name; ``default_0`` and so on if left out.
            weight_name: which file of the folder.
            network_alphas: alpha by layer, as pipelines give them.
            metadata: PEFT's settings, as pipelines give them.
            on_students: whether student blocks take the layers of the block that they started from; by default
                `lora_on_students`.
            ignored: what pipelines say about downloads and memory.

        Returns:
            What became of it in the present mixture; ``None`` where the file holds nothing for the transformer.

        Raises:
            PpclError: the file cannot be read, or is for another model; nothing is changed then.
        """
        alone = graph_info(self.graph).get("alone")
        if alone:
            raise PpclError(
                f"{alone} has no place for a LoRA: blocks that it was trained for are gone; load it into the pluggable "
                "model, fuse it there, and fine-tune or export that"
            )
        need_peft()
        pipeline = ignored.get("_pipeline")
        kind = graph_info(self.graph).get("config", {}).get("_class_name", "")
        modules = {path for path, _ in self.graph.named_modules()}
        lora = read_lora(
            pretrained_model_name_or_path_or_dict,
            prefix,
            weight_name,
            metadata,
            network_alphas,
            # A pipeline has converted it, and loads the other components itself.
            model=Model(modules, kind) if pipeline is None else None,
            elsewhere=getattr(pipeline, "_lora_loadable_modules", ()),
        )
        if not lora.modules:
            log.warning("%s: the LoRA holds nothing for the transformer", lora.where)
            return None
        name = adapter_name if adapter_name is not None else f"default_{len(self._adapters.loaded)}"
        onto = self.lora_on_students if on_students is None else on_students
        self._adapters.load(name, lora, onto, swap=hotswap)
        self._weights_written()
        self._mark()
        report = self.lora_report(name)
        log.log(logging.WARNING if report.removed + report.projectors else logging.INFO, "%s", report)
        return report

    def lora_report(self, name: str | None = None) -> LoraReport:
        """Return what becomes of a LoRA (the last active one by default) in the present mixture."""
        if name is None:
            name = next(iter(reversed(self.active_adapters())), "")
        return self._adapters.report(name, self._view(frozenset(self.students), self.graph), self.students)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Choose which LoRAs count and how strongly, 1 if not said; all others count for nothing."""
        names = _listed(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise PpclError(f"{len(names)} LoRAs and {len(given)} weights; give one weight for each")
        chosen = {name: 1.0 if weight is None else weight for name, weight in zip(names, given, strict=True)}
        for name, weight in chosen.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise PpclError(f"the weight of LoRA {name!r} is {weight!r}; give one number for the whole transformer")
        self._adapters.check_known(*names)
        with self._changed() as adapters:
            adapters.active = names
            adapters.loaded |= {n: replace(adapters.loaded[n], strength=float(w)) for n, w in chosen.items()}

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Choose which LoRAs count."""
        self.set_adapters(adapter_name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget LoRAs; weights that no other one changes are again what they were, to the bit."""
        names = _listed(adapter_names)
        self._adapters.check_known(*names)
        with self._changed() as adapters:
            adapters.loaded = {name: lora for name, lora in adapters.loaded.items() if name not in names}
            adapters.active = [name for name in adapters.active if name not in names]
        self._mark()

    def unload_lora(self) -> None:
        """Forget every LoRA; the weights are what they were, to the bit. Where they were fused they stay so."""
        self._adapters.unload()
        self._weights_written()
        self._mark()

    def active_adapters(self) -> list[str]:
        """Return the names of the LoRAs that count, in the order in which they are added."""
        return list(self._adapters.active)

    @property
    def lora_is_fused(self) -> bool:
        """Whether the active LoRAs are to stay in the weights when they are unloaded."""
        return self._adapters.fused

    def require_no_lora(self, what: str) -> None:
        """Raise `PpclError` where a LoRA that is not fused counts: `what` would take it for part of the weights."""
        if "_lora" in self.__dict__ and self._adapters.active and not self._adapters.fused:
            raise PpclError(
                f"LoRA {self._adapters.active[0]!r} is loaded, and {what} would take it for part of the weights; call "
                "unload_lora() to go on without it, or fuse_lora() to make it part of them"
            )

    def enable_lora(self) -> None:
        """Let the active LoRAs count again after `disable_lora`."""
        with self._changed() as adapters:
            adapters.enabled = True

    def disable_lora(self) -> None:
        """Let no LoRA count, and forget none."""
        with self._changed() as adapters:
            adapters.enabled = False

    enable_adapters, disable_adapters = enable_lora, disable_lora

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Make the active LoRAs part of the weights: they stay when the LoRAs are unloaded, and are saved.

        Args:
            lora_scale: a factor of all of them.
            safe_fusing: refuse weights that are not finite.
            adapter_names: which; the active ones by default.
        """
        if adapter_names is not None:
            loaded = self._adapters.loaded
            self.set_adapters(adapter_names, [loaded[n].strength if n in loaded else 1.0 for n in adapter_names])
        self._scale_lora(lora_scale)
        if safe_fusing and any(not torch.isfinite(parameter).all() for parameter in self.graph.parameters()):
            self._scale_lora(1.0)
            raise PpclError("the weights are not finite with the LoRA fused; lower its weight")
        self._adapters.fused = True

    def unfuse_lora(self) -> None:
        """Take the LoRAs out of the weights again, as long as they are loaded; they go on counting."""
        self._adapters.fused = False
        self._scale_lora(1.0)

    def _scale_lora(self, scale: float) -> None:
        if self._adapters.scale != scale:
            with self._changed() as adapters:
                adapters.scale = scale

    @contextmanager
    def _changed(self) -> Iterator[Adapters]:
        with self._adapters.change():
            yield self._adapters
        self._weights_written()

    def _take_scale(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take ``scale`` out of a call's ``attention_kwargs``, whatever they are called, as diffusers' models do."""
        scaled = {name: value for name, value in given.items() if isinstance(value, dict) and "scale" in value}
        if "_lora" in self.__dict__ and self._adapters.loaded and not self._adapters.fused:
            self._scale_lora(float(next((value["scale"] for value in scaled.values()), 1.0)))
        traced = graph_info(self.graph)["inputs"]
        rest = {
            name: {key: item for key, item in value.items() if key != "scale"} or None
            for name, value in scaled.items()
            if name not in traced
        }
        return given | rest

    def _mark(self) -> None:
        """Put a sign on a model that has LoRAs, and take it off one that has none: pipelines look for PEFT's layers.

        It is a module without weights, of PEFT's class. Through it ``pipe.get_active_adapters``, ``pipe.unfuse_lora``
        and ``pipe.fused_loras`` find what they look for.
        """
        self._modules.pop(MARK, None)
        if self._adapters.loaded:
            self.add_module(MARK, _lora_mark(self))


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _lora_mark(model: LoraModel) -> nn.Module:
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

    return LoraMark()
