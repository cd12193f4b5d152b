"""What stock diffusers pipelines ask of their transformer, for a pluggable model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl_fx.calls.kinds import REFUSALS, kind_of
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.lora.methods import LoraModel
from ppcl_fx.model.face import PipelineFace
from ppcl_fx.model.offload import GroupOffload
from ppcl_fx.model.retrace import dtypes_of, retraced, sparing_complex
from ppcl_fx.tracing import Unused, bind, graph_for

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ppcl_fx.schema.plan import Plan


class PipelineModel(LoraModel, GroupOffload, PipelineFace):
    """A model of diffusers by its class, so that pipelines take it as ``transformer=`` and call its methods.

    Device and dtype moves, LoRA, attention backends, ``torch.compile``, ``enable_model_cpu_offload`` and group
    offloading by blocks work as on any transformer of diffusers. What cannot be right is refused in one line.
    """

    graph: GraphModule
    _plan: Plan

    @property
    def config(self) -> Any:
        """The teacher's configuration, as diffusers pipelines read it."""
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(graph_info(self.graph).get("config", {}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the teacher answers: of the parameters that its class does not keep in float32."""
        return main_dtype(self.graph)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.graph.parameters()).device

    def _class_config(self) -> Any:
        return graph_info(self.graph).get("config", {}) if "graph" in self._modules else None

    def _class_weights(self) -> Mapping[str, torch.Tensor]:
        return {**dict(self.graph.named_parameters()), **dict(self.graph.named_buffers())}

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
        self.require_not_offloaded()
        self._adapters.check_untouched()
        before, dtypes = self._place(), dtypes_of(fn)
        other = {t.dtype for t in self.graph.parameters() if dtypes(t.dtype) != t.dtype}
        # First of all, because it may be refused, and then nothing has been changed yet.
        graph = retraced(self.graph, self._plan, dtypes) if other else None
        super()._apply(sparing_complex(fn), recurse)  # type: ignore[no-untyped-call]
        if graph is not None:
            self.graph = graph
        for kind in (graph_info(self.graph).get("kinds") or {}).values():
            kind._apply(sparing_complex(fn))  # the same modules; but it holds tensors between them by itself
        info = graph_info(self.graph)
        info["unused"] = Unused({name: sparing_complex(fn)(tensor) for name, tensor in info["unused"].items()})
        # Offloading hooks move a model before each call, mostly to where it is.
        if before != self._place():
            self._adapters.moved(self.graph)
            self.weights_changed()
            self._forget_class()
        return self

    def retrace(self, **example: Any) -> Any:
        """Trace the model again for another kind of call, with the weights and edits that it has.

        A call of a kind that is new is traced by itself. This chooses the kind that is saved with the model, and that
        it is exported for.

        Args:
            example: the arguments of such a call: one with a ControlNet's residuals, with other inputs in another
                dtype, with a mask. Only shapes and dtypes of tensors count.

        Returns:
            The model itself.

        Raises:
            PpclError: the teacher is no model of diffusers, or such a call cannot be traced; nothing is changed then.
        """
        self.graph = retraced(self.graph, self._plan, example=example)
        self._adapters.moved(self.graph)
        self.weights_changed()
        return self

    def graph_for(self, kwargs: Mapping[str, Any]) -> GraphModule:
        """Return the pluggable graph for calls of one kind. One that is new is traced, with the weights there are.

        Raises:
            GuardError: the teacher is no model of diffusers, or such a call cannot be traced.
        """
        return self._bound(kwargs)[0]

    def _bound(self, kwargs: Mapping[str, Any]) -> tuple[GraphModule, dict[str, Any]]:
        """Return the pluggable graph for a call, and the call's arguments by the names of the graph's inputs."""
        graph = graph_for(self.graph, kwargs)
        try:
            return graph, bind(graph, kwargs)
        except GuardError as outside:
            reason = str(outside).rpartition("; ")[0]
            try:
                graph = retraced(self.graph, self._plan, example=kwargs)
            except PpclError as error:
                raise GuardError(f"{reason}; {error}") from error
            except REFUSALS as error:
                words = " ".join(str(error).split())[:200]
                raise GuardError(f"{reason}; nor does the model itself take such a call: {words}") from error
        graph_info(self.graph).setdefault("kinds", {})[kind_of(kwargs)] = graph
        return graph, bind(graph, kwargs)

    def _place(self) -> list[tuple[torch.device, torch.dtype, int]]:
        """Return where the weights lie: what views of them depend on."""
        tensors = [*self.graph.parameters(), *self.graph.buffers()]
        return [(t.device, t.dtype, 0 if t.is_meta else t.data_ptr()) for t in tensors]

    # ---- attention ---------------------------------------------------------------------------------------------

    def set_attention_backend(self, backend: str) -> None:
        """Choose the kernels of every attention, as on any model of diffusers.

        In a mixture with text-stream projectors some attentions are part of the graph; they are traced again with the
        new kernels.

        Raises:
            ValueError: diffusers does not know the backend.
            RuntimeError: its package is not installed.
        """
        super().set_attention_backend(backend)  # type: ignore[misc]
        self.weights_changed()

    def reset_attention_backend(self) -> None:
        """Go back to the kernels of torch."""
        super().reset_attention_backend()  # type: ignore[misc]
        self.weights_changed()

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
        from ppcl_fx.model.pluggable import load

        return load(folder, dtype=options.get("dtype", options.get("torch_dtype")))

    def _save(self, folder: Path, replaces: owned.Kind | None) -> Path:
        """Write the model, over a folder of the kind that may be replaced."""
        raise NotImplementedError
