"""The layout in which the paper's authors released their pruned models: read it, write it, plug it into its teacher.

A folder of this layout looks like a diffusers folder, but its ``config.json`` lists blocks whose parts were replaced by
linear projectors, and diffusers cannot load it::

    model = ppcl_fx.formats.released.load(folder)                        # called like the transformer
    model = ppcl_fx.formats.released.with_teacher(folder, teacher, kw)   # a PluggableModel: every edit switchable
    ppcl_fx.formats.released.save_released(model, folder)                # a mixture, in this layout
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx.calls.kinds import kind_of
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.formats.layout import LISTS, STACK, Layout, compare, graph_paths
from ppcl_fx.formats.numbering import Kept, translated
from ppcl_fx.formats.rejoin import with_teacher
from ppcl_fx.formats.release import save_released
from ppcl_fx.io.build_bounds import Room
from ppcl_fx.io.files import inside, read_json
from ppcl_fx.io.shards import Shards
from ppcl_fx.ir.dtypes import kept_in_float32, main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.face import GroupOffload, PipelineFace
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.retrace import dtypes_of, take_dtypes
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import is_released, transformer_class, transformer_folder
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.meta_model import skeleton as weightless

CONFIG = "config.json"
WHOLE = 16
"""How much larger a model of whole blocks may be than what is left of it."""

__all__ = ["ReleasedModel", "is_released", "load", "save_released", "with_teacher"]


class ReleasedModel(GroupOffload, PipelineFace):
    """A pruned model read from the released layout; behaves like the transformer it was made from.

    Its ``state_dict`` is the checkpoint's. The graph that computes it is traced at the first call, and again for a call
    outside of what was traced.

    Args:
        skeleton: the transformer's class with as many whole blocks, its parameters on the meta device.
        layout: the lists.
        tensors: the checkpoint's tensors by name.
    """

    KIND = "a released checkpoint"

    def __init__(self, skeleton: nn.Module, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name in sorted(tensors, key=_numbered):
            _register(self, name, tensors[name])
        self.layout = layout
        kept = [Kept(index, index, f"{STACK}.{index}") for index in range(layout.num_layers)]
        self._paths = graph_paths([], Plan(edits=layout.edits()), kept, layout)
        # Plain attributes, so that torch does not take what has no weights for submodules.
        take_dtypes(skeleton, self)
        self.__dict__["_skeleton"] = skeleton
        self.__dict__["_edited"] = None
        self.__dict__["_view"] = self.__dict__["_kind"] = None
        self.__dict__["_others"] = {}

    @property
    def plan(self) -> Plan:
        """The width edits that the lists say, in this model's own block numbers; its blocks are all that is left."""
        return Plan(edits=self.layout.edits(), params=self.param_count())

    @property
    def config(self) -> Any:
        """The configuration, with the three lists, as diffusers pipelines read it."""
        from diffusers.configuration_utils import FrozenDict

        lists = {name: getattr(self.layout, name) for name in LISTS}
        return FrozenDict({**self.__dict__["_skeleton"].config, **lists})

    def _class_config(self) -> Any:
        skeleton = self.__dict__.get("_skeleton")
        return None if skeleton is None else {**skeleton.config, "_class_name": type(skeleton).__name__}

    def _class_weights(self) -> Mapping[str, torch.Tensor]:
        return dict(self.named_parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the unpruned model answers: of the parameters that its class does not keep in float32."""
        return main_dtype(self.__dict__["_skeleton"])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def param_count(self) -> int:
        """Return the number of parameters of the checkpoint."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the model on the transformer's own arguments. Raises PpclError where the call cannot be traced."""
        self._check_class()
        names = list(inspect.signature(self.__dict__["_skeleton"].forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.__dict__["_view"] is None:
            self._prepare(given)
        try:
            result = self._call(given)
        except GuardError:
            result = self._call_other(given)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0])

    def pluggable(self, example_kwargs: Mapping[str, Any]) -> PluggableModel:
        """Return this model as a pluggable one without an edit: what export takes, with `keep=1.0` alone.

        Args:
            example_kwargs: the keyword arguments of one call.
        """
        self._trace(example_kwargs)
        graph = self._bound()
        graph_info(graph)["alone"] = self.KIND
        return PluggableModel(graph, Plan())

    def _call_other(self, given: Mapping[str, Any]) -> Any:
        """Run a call that is not of the last one's kind: by the graph of its own kind, if it has been met before."""
        self.__dict__["_others"][self.__dict__["_kind"]] = self.__dict__["_view"]
        known = self.__dict__["_others"].pop(kind_of(given), None)
        if known is not None:
            self.__dict__["_view"], self.__dict__["_kind"] = known, kind_of(given)
            with suppress(GuardError):
                return self._call(given)
        self._trace(given)
        self._prepare(given)
        return self._call(given)

    def _call(self, given: Mapping[str, Any]) -> Any:
        view = self.__dict__["_view"]
        # Only where it differs: a call inside of torch.compile should find nothing to change.
        gm = view if view.training == self.training else view.train(self.training)
        return self._runner(gm)(**bind(gm, given))

    @torch.compiler.disable(reason="a released checkpoint is traced at its first call: call it once, then compile it")  # type: ignore[untyped-decorator]
    def _prepare(self, given: Mapping[str, Any]) -> None:
        """Trace the call where that is still to be done, and put the weights into the graph."""
        if self.__dict__["_edited"] is None:
            self._trace(given)
        self._bound()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _trace(self, kwargs: Mapping[str, Any]) -> None:
        traced = trace(self.__dict__["_skeleton"], kwargs)
        self.__dict__["_edited"] = insert_edits(traced, Plan(edits=self.layout.edits()))
        self.__dict__["_view"], self.__dict__["_kind"] = None, kind_of(kwargs)

    def _bound(self) -> GraphModule:
        """Return the graph with this module's parameters in it."""
        if self.__dict__["_view"] is None:
            edits = frozenset(edit.id for edit in self.layout.edits())
            view = plugged(self.__dict__["_edited"], edits)
            own = dict(self.named_parameters())
            if any(parameter.is_meta for parameter in own.values()):
                raise PpclError(
                    "the checkpoint's weights lie on the meta device: accelerate offloads it leaf by leaf, and a graph "
                    "has other leaves; call pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload()"
                )
            for name, shape in [(name, parameter.shape) for name, parameter in view.named_parameters()]:
                wanted = translated(name, self._paths)
                parent, _, leaf = name.rpartition(".")
                value = own.get(wanted)
                if value is None and wanted.rpartition(".")[0].endswith(".ehs_proj"):
                    # A group without a second projector passes the text state through: a projector of zeros.
                    value = nn.Parameter(torch.zeros(shape, dtype=self.dtype), requires_grad=False)
                if value is None or value.shape != shape:
                    raise RuntimeError(f"the graph wants {wanted} of shape {list(shape)}, which was not checked for")
                view.get_submodule(parent)._parameters[leaf] = value
            self.__dict__["_view"] = view.to(self.device)
        view = self.__dict__["_view"]
        assert isinstance(view, GraphModule)
        return view.train(self.training)

    # ---- what pipelines do with it -----------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, to a dtype, or both, as `torch.nn.Module.to`."""
        return nn.Module.to(self, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> ReleasedModel:
        self.require_not_offloaded()
        dtypes = dtypes_of(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        skeleton = self.__dict__["_skeleton"]
        take_dtypes(skeleton, skeleton, dtypes)  # where parts were replaced it has more than the checkpoint
        self.weights_changed()
        self._forget_class()
        return self

    def weights_changed(self) -> None:
        self.__dict__["_view"] = None
        self.__dict__["_others"] = {}

    def set_attention_backend(self, backend: str) -> None:
        """Choose the kernels of every attention, as on any model of diffusers; the next call traces with them."""
        self.__dict__["_skeleton"].set_attention_backend(backend)
        self._trace_anew()

    def reset_attention_backend(self) -> None:
        """Go back to the kernels of torch."""
        self.__dict__["_skeleton"].reset_attention_backend()
        self._trace_anew()

    def _trace_anew(self) -> None:
        self.__dict__["_edited"] = None
        self.weights_changed()

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the blocks of a checkpoint have numbers of their own, and a LoRA has the teacher's."""
        self._refuse(
            "no place for a LoRA: its blocks are numbered anew; plug it into its teacher: "
            "ppcl_fx.formats.released.with_teacher(folder, teacher, example_kwargs)"
        )

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Refuse: its own folder is how it is saved."""
        self._refuse(f"nothing to save, {save_directory} included: copy the folder that it was loaded from")


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> ReleasedModel:
    """Load a checkpoint of the released layout. No code from the folder is run, and no teacher is needed.

    Args:
        folder: the transformer's folder, or a pipeline's folder with one in it.
        dtype: dtype of the weights; by default as stored.

    Raises:
        PpclError: a file is missing or truncated, the lists contradict each other, or they disagree with the weights.
    """
    folder = transformer_folder(Path(folder))
    layout, skeleton = open_layout(folder, dtype)
    return ReleasedModel(skeleton, layout, Shards.open(folder).tensors(dtype, kept_in_float32(skeleton))).eval()


def open_layout(folder: Path, dtype: torch.dtype | None = None) -> tuple[Layout, nn.Module]:
    """Read and check everything of a checkpoint but its tensors; return the lists and the model without weights.

    Raises:
        PpclError: see `load`.
    """
    path = inside(folder, CONFIG)
    layout = read_json(path, Layout)
    layout.check(str(path))
    kind = transformer_class(path)
    weights = Shards.open(folder)
    room = Room.of(weights.shapes, times=WHOLE)
    stored = weights.dtype(kept_in_float32(kind))
    skeleton = weightless(kind, layout.config, dtype or stored, room=room, where=str(path))
    if len(getattr(skeleton, STACK, ())) != layout.num_layers:
        raise PpclError(f"{path}: {kind.__name__} has no {STACK} that num_layers counts; not of the released layout")
    compare(weights, skeleton, layout)
    return layout, skeleton


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a dotted name, in plain modules made for it, and in lists where the names are numbers."""
    *path, leaf = name.split(".")
    for part, following in zip(path, [*path[1:], leaf], strict=True):
        if part not in root._modules:
            root.add_module(part, nn.ModuleList() if following.isdigit() else nn.Module())
        child = root._modules[part]
        assert child is not None
        root = child
    root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _numbered(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
