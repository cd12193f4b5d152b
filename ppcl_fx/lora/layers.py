"""The changes of a LoRA as PEFT's own layers: matched, scaled and merged by PEFT, each into the weights it is given.

PEFT wraps a layer and keeps the adapter beside it. Here it wraps stand-ins, of the right kind and shape but without
weights, so that diffusers and PEFT read a LoRA as they do for any model: its layout, ranks, alphas, variants. The real
weights are put under PEFT's layer when it merges.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ppcl_fx.errors import PpclError
from ppcl_fx.lora.convert import FAULTS, line
from ppcl_fx.lora.keys import LAYOUT, Lora

PREFIX = "transformer"
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What a LoRA may change."""


@dataclass(frozen=True)
class Layer:
    """The change of one layer.

    Attributes:
        tuner: PEFT's layer, over a stand-in.
        name: the adapter's name in it.
    """

    tuner: Any
    name: str

    @property
    def changes(self) -> tuple[str, ...]:
        """The names of the parameters that it changes."""
        return ("weight", "bias") if getattr(self.tuner, "lora_bias", {}).get(self.name) else ("weight",)

    def scaling(self, strength: float) -> float:
        """Return the factor of ``B A``, as PEFT computes it from alpha and rank."""
        tuner = copy.copy(self.tuner)
        tuner.scaling = dict(tuner.scaling)
        tuner.set_scale(self.name, strength)
        return float(tuner.scaling[self.name])


def need_peft() -> None:
    """Raise `PpclError` where PEFT is not installed: layouts and settings of LoRAs are its matter."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise PpclError("a LoRA is read by PEFT, which is not installed: pip install 'ppcl-fx[lora]'") from None


def misfits(lora: Lora, modules: Mapping[str, nn.Module]) -> str:
    """Say in words why a LoRA is not for a model, or return an empty string.

    Args:
        lora: the LoRA.
        modules: the model's modules by path.
    """
    missing = [path for path in lora.modules if not isinstance(modules.get(path), KINDS)]
    if missing:
        first = missing[0]
        kind = ", which is no layer that a LoRA changes" if first in modules else ""
        note = f"; {lora.note}" if lora.note else ""
        return f"{len(missing)} of its {len(lora.modules)} layers do not exist here, the first is {first!r}{kind}{note}"
    wrong = [path for path in lora.modules if _misshapen(lora, path, modules[path])]
    if wrong:
        down, up = (lora.tensors[f"{wrong[0]}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        return (
            f"{len(wrong)} of its {len(lora.modules)} layers have another shape, the first is {wrong[0]!r}: the LoRA's "
            f"is {_size((up.shape[0], *down.shape[1:]))}, the model's {_size(_weight(modules[wrong[0]]).shape)}"
        )
    bare = [path for path in lora.modules if f"{path}.lora_B.bias" in lora.tensors and modules[path].bias is None]
    return f"it changes the bias of {bare[0]!r}, which has none" if bare else ""


def _misshapen(lora: Lora, path: str, module: nn.Module) -> bool:
    down, up, bias = (lora.tensors.get(f"{path}.{part}") for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    if down is None or up is None:
        return False  # of another kind than LoRA: PEFT compares
    shape = tuple(_weight(module).shape)
    return (up.shape[0], *down.shape[1:]) != shape or (bias is not None and tuple(bias.shape) != (shape[0],))


def _weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight")


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def attach(lora: Lora, modules: Mapping[str, nn.Module], name: str) -> dict[str, Layer]:
    """Let diffusers and PEFT read a LoRA for the layers that it changes.

    Args:
        lora: the LoRA; it fits the modules.
        modules: the model's modules by path; they stay as they are.
        name: the adapter's name in PEFT's layers, one of its own.

    Returns:
        Module path -> its change.

    Raises:
        PpclError: they refuse it, or its settings and its tensors differ.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    host = _host(lora, modules)
    if lora.settings is not None:
        _check_ranks(lora, lora.settings)
    try:
        with _quiet():
            host.load_lora_adapter(
                _behind(PREFIX, lora.tensors),
                prefix=PREFIX,
                adapter_name=name,
                network_alphas=_behind(PREFIX, lora.alphas) or None,
                metadata=lora.settings and _behind(PREFIX, {**lora.settings, "target_modules": list(lora.modules)}),
                low_cpu_mem_usage=True,
            )
    except FAULTS as error:
        raise PpclError(f"{lora.where}: diffusers and PEFT refuse it ({line(error)}); {LAYOUT}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would warn of what is written, and nothing is
        taken = get_peft_model_state_dict(host, adapter_name=name)
    idle = sorted(lora.tensors.keys() - taken.keys())
    if idle:
        raise PpclError(f"{lora.where}: its settings or its other tensors leave no place for {idle[0]}; save it again")
    found = {path: module for path, module in host.named_modules() if isinstance(module, BaseTunerLayer)}
    for path, tuner in found.items():
        _complete(lora.where, path, tuner, name)
    return {path: Layer(tuner, name) for path, tuner in found.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what is no news here: `target_modules` that match by their ends, and what is raised anyway."""
    logs = [logging.getLogger(name) for name in ("diffusers.loaders.peft", "diffusers.utils.peft_utils")]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
            yield
    finally:
        for log, was in zip(logs, before, strict=True):
            log.disabled = was


def _behind(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _host(lora: Lora, modules: Mapping[str, nn.Module]) -> Any:
    """Return a model of stand-ins for the layers that a LoRA changes, at their paths."""
    from diffusers.loaders.peft import PeftAdapterMixin

    class Host(nn.Module, PeftAdapterMixin):  # type: ignore[misc]
        """What diffusers puts an adapter on."""

    host = Host()
    for path in lora.modules:
        parent: nn.Module = host
        *above, last = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, _stand_in(modules[path], _hollow(modules[path])))
    return host.requires_grad_(False)


def _hollow(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a module's shapes without memory of their own, in float32: PEFT casts an adapter to their dtype."""
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}


def _stand_in(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module like another one with other parameters; it shares no container with it."""
    made = copy.copy(module)
    made.__dict__.update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    given = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    made._parameters = {name: given.get(name) for name in module._parameters}
    return made


def _check_ranks(lora: Lora, settings: Mapping[str, Any]) -> None:
    """Raise where the settings, matched as PEFT matches them, give a layer another rank than its tensors have."""
    from peft.utils.other import get_pattern_key

    for path in lora.modules:
        down = lora.tensors.get(f"{path}.lora_A.weight")
        pattern = get_pattern_key(settings["rank_pattern"].keys(), path)
        rank = settings["rank_pattern"].get(pattern, settings["r"])
        if down is not None and down.shape[0] != rank:
            raise PpclError(
                f"{lora.where}: {path} has rank {rank} by its settings, {down.shape[0]} by its tensors; save it again"
            )


def _complete(where: str, path: str, tuner: Any, name: str) -> None:
    """Check that PEFT has got every tensor that its layer needs; a bias may be missing, and is none then."""
    for key, parameter in tuner.named_parameters():
        if not parameter.is_meta:
            continue
        if not key.endswith(".bias"):
            raise PpclError(f"{where}: {path} lacks {key.replace(f'.{name}', '')}; save it again")
        tuner.lora_B[name].bias = None
        tuner.lora_bias[name] = False


def merged(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], changes: Iterable[tuple[Layer, float]]
) -> dict[str, torch.Tensor]:
    """Merge changes into weights, in their order, as ``fuse_lora`` of diffusers does.

    Args:
        module: the layer; it stays as it is.
        tensors: its parameters without the changes, on the device where to compute; they are overwritten.
        changes: each with its strength.

    Returns:
        The parameters with the changes.

    Raises:
        PpclError: PEFT refuses: it cannot merge a change, or the result is not finite.
    """
    base = _stand_in(module, tensors)
    for _, run in groupby(changes, key=lambda change: type(change[0].tuner)):
        together = list(run)
        tuner = _joined([layer for layer, _ in together], base)
        for layer, strength in together:
            tuner._move_adapter_to_device_of_base_layer(layer.name)
            tuner.set_scale(layer.name, strength)
        try:
            tuner.merge(safe_merge=True, adapter_names=[layer.name for layer, _ in together])
        except FAULTS as error:
            raise PpclError(f"PEFT cannot merge the LoRA ({line(error)}); merge it into the teacher instead") from error
    return {name: parameter.detach() for name, parameter in base.named_parameters(recurse=False)}


def _joined(layers: list[Layer], base: nn.Module) -> Any:
    """Return one layer of PEFT's over `base` that has all adapters: what one of them does may depend on the weight."""
    tuners = [copy.deepcopy(layer.tuner, {id(layer.tuner.base_layer): base}) for layer in layers]
    first = tuners[0]
    for layer, tuner in zip(layers[1:], tuners[1:], strict=True):
        first.adapter_layer_names = tuple(dict.fromkeys(first.adapter_layer_names + tuner.adapter_layer_names))
        for name in (*tuner.adapter_layer_names, *tuner.other_param_names, "lora_variant"):
            mine, theirs = getattr(first, name, None), getattr(tuner, name, None)
            if mine is not None and theirs is not None and layer.name in theirs:
                mine[layer.name] = theirs[layer.name]
    return first
