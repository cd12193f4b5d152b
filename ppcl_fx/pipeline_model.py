"""What stock diffusers pipelines ask of their transformer, for a pluggable model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl_fx import owned
from ppcl_fx.errors import PpclError
from ppcl_fx.lora.methods import LoraModel
from ppcl_fx.offload import Offload, Pieces, announce, offload, offloaded
from ppcl_fx.retrace import dtypes_of, retraced, sparing_complex
from ppcl_fx.uncached import Uncached

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.plan import Plan

    class _DiffusersModel(nn.Module):
        """Typed in part only."""

else:
    from diffusers import ModelMixin as _DiffusersModel


class PipelineModel(LoraModel, Uncached, _DiffusersModel):
    """A model of diffusers by its class, so that pipelines take it as ``transformer=`` and call its methods.

    Device and dtype moves, LoRA, attention backends, ``torch.compile``, ``enable_model_cpu_offload`` and group
    offloading by blocks work as on any transformer of diffusers. What cannot be right is refused in one line.
    """

    graph: GraphModule
    _plan: Plan
    _offload: Offload | None = None

    @property
    def config(self) -> Any:
        """The teacher's configuration, as diffusers pipelines read it."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self.graph.meta["ppcl"].get("config", {}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point parameters."""
        return next(p.dtype for p in self.graph.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.graph.parameters()).device

    # ---- moves -------------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, to a dtype, or both, as `torch.nn.Module.to`; another dtype traces the model again.

        Raises:
            PpclError: another dtype, and the teacher is no model of diffusers: it cannot be traced again.
        """
        # Not diffusers' own `to`, which warns of every dtype.
        return nn.Module.to(self, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if "graph" not in self._modules:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._offload is not None:
            raise PpclError("the model is offloaded by blocks, so it is not moved; load it again to move it")
        self._adapters.check_untouched()
        before, dtypes = self._place(), dtypes_of(fn)
        other = {t.dtype for t in self.graph.parameters() if dtypes(t.dtype) != t.dtype}
        # First of all, because it may be refused, and then nothing has been changed yet.
        graph = retraced(self.graph, self._plan, dtypes) if other else None
        super()._apply(sparing_complex(fn), recurse)  # type: ignore[no-untyped-call]
        if graph is not None:
            self.graph = graph
        # Offloading hooks move a model before each call, mostly to where it is.
        if before != self._place():
            self._adapters.moved(self.graph)
            self._weights_changed()
        return self

    def retrace(self, **example: Any) -> Any:
        """Trace the model again for another kind of call, with the weights and edits that it has.

        Args:
            example: the arguments of such a call: one with a ControlNet's residuals, with other inputs in another
                dtype, with a mask. Only shapes and dtypes of tensors count.

        Returns:
            The model itself, which now takes calls like this one, and no others.

        Raises:
            PpclError: the teacher is no model of diffusers, or such a call cannot be traced; nothing is changed then.
        """
        self.graph = retraced(self.graph, self._plan, example=example)
        self._adapters.moved(self.graph)
        self._weights_changed()
        return self

    def _place(self) -> list[tuple[torch.device, torch.dtype, int]]:
        """Return where the weights lie: what views of them depend on."""
        tensors = [*self.graph.parameters(), *self.graph.buffers()]
        return [(t.device, t.dtype, 0 if t.is_meta else t.data_ptr()) for t in tensors]

    # ---- attention, compilation, offloading --------------------------------------------------------------------

    def set_attention_backend(self, backend: str) -> None:
        """Choose the kernels of every attention, as on any model of diffusers.

        In a mixture with text-stream projectors some attentions are part of the graph; they are traced again with the
        new kernels.

        Raises:
            ValueError: diffusers does not know the backend.
            RuntimeError: its package is not installed.
        """
        super().set_attention_backend(backend)  # type: ignore[misc]
        self._weights_changed()

    def reset_attention_backend(self) -> None:
        """Go back to the kernels of torch."""
        super().reset_attention_backend()  # type: ignore[misc]
        self._weights_changed()

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Keep the weights on one device and compute block by block on another.

        Args:
            onload_device: where to compute.
            offload_device: where the weights rest.
            offload_type: ``block_level``.
            options: as diffusers takes them (``num_blocks_per_group``, ``use_stream``, ``non_blocking`` ...).

        Raises:
            PpclError: offloading by leaves, or the model is offloaded already.
        """
        if self._offload is not None:
            raise PpclError("the model is offloaded already; load it again to offload it in another way")
        how = offload(onload_device, offload_device, offload_type, options)
        self.to(how.offload_device)
        announce(self, how)
        self._offload = how
        self._weights_changed()

    def _runner(self, gm: GraphModule) -> GraphModule | Pieces:
        """Return what runs a mixture: itself, or its pieces with offloading hooks."""
        if self._offload is None:
            return gm
        kept = self.__dict__.get("_pieces")
        if kept is None or kept[0] is not gm:
            kept = self.__dict__["_pieces"] = (gm, offloaded(gm, self._offload))
        pieces = kept[1]
        assert isinstance(pieces, Pieces)
        return pieces

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the blocks lie open in the graph."""
        raise PpclError("the blocks of a pluggable model are part of one graph; compile it whole: torch.compile(model)")

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: weights that change their dtype behind the graph's back."""
        raise PpclError("layerwise casting changes dtypes that the graph was traced with; use to(torch.bfloat16)")

    # ---- saving ------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Write the model as `save` does: what ``pipeline.save_pretrained`` calls. Replaces a saved model only.

        Raises:
            PpclError: the folder holds something else, what a training wrote included.
        """
        del ignored
        self._save(Path(save_directory), owned.SAVED)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Load what `save` wrote; as `ppcl_fx.load`. Of the options only ``dtype`` and ``torch_dtype`` count."""
        from ppcl_fx.model import load

        return load(folder, dtype=options.get("dtype", options.get("torch_dtype")))

    def _save(self, folder: Path, replaces: owned.Kind | None) -> Path:
        """Write the model, over a folder of the kind that may be replaced."""
        raise NotImplementedError
