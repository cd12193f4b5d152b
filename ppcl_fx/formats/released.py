"""The layout in which the paper's authors released their pruned models: read it, write it, plug it into its teacher.

It is a diffusers folder, but for lists in ``config.json`` of the blocks with linear projectors in place of parts.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ppcl_fx._version import __version__
from ppcl_fx.calls.kinds import kind_of
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.formats.layout import LISTS, STACK, Layout, expected, graph_paths, layout_of, open_layout
from ppcl_fx.formats.pruned import Kept, kept_blocks, originals, plugged_plan, translated, write_pruned
from ppcl_fx.formats.rejoin import with_teacher
from ppcl_fx.io.shards import Shards
from ppcl_fx.ir.dtypes import kept_in_float32, main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.face import GroupOffload, PipelineFace
from ppcl_fx.model.pluggable import PluggableModel
from ppcl_fx.model.retrace import dtypes_of, take_dtypes
from ppcl_fx.model.rewrite import insert_edits
from ppcl_fx.model.sources import diffusers_class, is_released, transformer_folder
from ppcl_fx.passes.edits.plug import plugged
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import bind, trace
from ppcl_fx.tracing.meta_model import skeleton as weightless

__all__ = ["ReleasedModel", "is_released", "load", "save_released", "with_teacher"]


class ReleasedModel(GroupOffload, PipelineFace):
    """A pruned model read from the released layout; behaves like the transformer it was made from.

    Its ``state_dict`` is the checkpoint's. The graph that computes it is traced at the first call, and again for a call
    outside of what was traced. `skeleton` is the transformer's class with as many whole blocks, on the meta device.
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
        self.__dict__.update(_skeleton=skeleton, _edited=None, _view=None, _kind=None, _others={})

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
        """Return this model, traced with a call, as a pluggable one without an edit: what export takes, at 1.0."""
        graph = self._prepare(example_kwargs, anew=True)
        plan = Plan(edits=self.layout.edits())
        graph_info(graph).update({"alone": self.KIND, "mixture": (plan, plan.ids)})
        return PluggableModel(graph, Plan())

    def _call_other(self, given: Mapping[str, Any]) -> Any:
        """Run a call that is not of the last one's kind: by the graph of its own kind, if it has been met before."""
        self.__dict__["_others"][self.__dict__["_kind"]] = self.__dict__["_view"]
        known = self.__dict__["_others"].pop(kind_of(given), None)
        if known is not None:
            self.__dict__.update(_view=known, _kind=kind_of(given))
            with suppress(GuardError):
                return self._call(given)
        self._prepare(given, anew=True)
        return self._call(given)

    def _call(self, given: Mapping[str, Any]) -> Any:
        view = self.__dict__["_view"]
        # Only where it differs: a call inside of torch.compile should find nothing to change.
        gm = view if view.training == self.training else view.train(self.training)
        return self._runner(gm)(**bind(gm, given))

    @torch.compiler.disable(reason="a released checkpoint is traced at its first call: call it once, then compile it")  # type: ignore[untyped-decorator]
    def _prepare(self, given: Mapping[str, Any], anew: bool = False) -> GraphModule:
        """Return the graph with this module's parameters in it, traced with a call where it is not, or is `anew`."""
        edits = self.layout.edits()
        if anew or self.__dict__["_edited"] is None:
            edited = insert_edits(trace(self.__dict__["_skeleton"], given), Plan(edits=edits))
            self.__dict__.update(_edited=edited, _view=None, _kind=kind_of(given))
        if self.__dict__["_view"] is None:
            view = plugged(self.__dict__["_edited"], frozenset(edit.id for edit in edits))
            own = dict(self.named_parameters())
            if any(parameter.is_meta for parameter in own.values()):
                why = "accelerate offloads it leaf by leaf, and a graph has other leaves"
                way = "call pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload()"
                raise PpclError(f"the checkpoint's weights lie on the meta device: {why}; {way}")
            for name, shape in {name: parameter.shape for name, parameter in view.named_parameters()}.items():
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
        found: GraphModule = self.__dict__["_view"].train(self.training)
        return found

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
        self.__dict__.update(_view=None, _others={})

    def set_attention_backend(self, backend: str) -> None:
        """Choose the kernels of every attention, as on any model of diffusers; the next call traces with them."""
        self.__dict__["_skeleton"].set_attention_backend(backend)
        self.__dict__["_edited"] = None
        self.weights_changed()

    def reset_attention_backend(self) -> None:
        """Go back to the kernels of torch."""
        self.__dict__["_skeleton"].reset_attention_backend()
        self.__dict__["_edited"] = None
        self.weights_changed()

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the blocks of a checkpoint have numbers of their own, and a LoRA has the teacher's."""
        way = "ppcl_fx.formats.released.with_teacher(folder, teacher, example_kwargs)"
        self._refuse(f"no place for a LoRA: its blocks are numbered anew; plug it into its teacher: {way}")

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Refuse: its own folder is how it is saved."""
        self._refuse(f"nothing to save, {save_directory} included: copy the folder that it was loaded from")


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> ReleasedModel:
    """Load a checkpoint of the released layout. No code from the folder is run, and no teacher is needed.

    Args:
        folder: the transformer's, or a pipeline's with one in it; PpclError where a file is missing or truncated, the
            lists contradict each other, or they disagree with the weights.
        dtype: dtype of the weights; by default as stored.
    """
    folder = transformer_folder(Path(folder))
    layout, skeleton = open_layout(folder, dtype)
    return ReleasedModel(skeleton, layout, Shards.open(folder).tensors(dtype, kept_in_float32(skeleton))).eval()


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a dotted name, in plain modules made for it, and in lists where the names are numbers."""
    *path, leaf = name.split(".")
    for part, following in itertools.pairwise([*path, leaf]):
        if part not in root._modules:
            root.add_module(part, nn.ModuleList() if following.isdigit() else nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _numbered(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``blocks.2`` before ``blocks.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def save_released(model: PluggableModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the mixture that is plugged now in the released layout; with `overwrite` over a folder that exists.

    PpclError where the mixture does not fit the layout (see `ppcl_fx.formats.layout`), or the folder cannot be written.
    """
    info, plan = graph_info(model.graph), plugged_plan(model)
    waiting = [edit for edit in model.plan.depth() if edit.id not in model.students]
    # The feed-forward edits of students that are not plugged themselves do nothing.
    starts = {(edit.stack, edit.first) for edit in waiting}
    edits = [e for e in plan.edits if not (isinstance(e, FfnEdit) and (e.stack, e.block) in starts)]
    plan = plan.model_copy(update={"edits": edits})
    _check(info, plan, waiting)
    kept = kept_blocks(info["blocks"], plan.depth())
    layout = layout_of(plan, kept[STACK], info["config"])
    tensors = _tensors(model, plan, kept[STACK], layout)
    config = {
        "_class_name": info["config"]["_class_name"],
        "_ppcl_fx_version": __version__,
        **layout.config,
        **{name: getattr(layout, name) for name in LISTS},
    }
    return write_pruned(model, kept, config, tensors, Path(folder), overwrite)


def _check(info: Mapping[str, Any], plan: Plan, waiting: Sequence[DepthEdit]) -> None:
    """Refuse what the three lists cannot say."""
    config = info.get("config", {})
    if not config.get("_class_name"):
        raise PpclError("the teacher has no diffusers configuration, so there is no released layout for it")
    lists = sorted({path.rpartition(".")[0] for path in info["blocks"]})
    if lists != [STACK] or "num_layers" not in config:
        why = f"the released layout knows one list of blocks, {STACK}, and this model has {', '.join(lists)}"
        raise PpclError(f"{why}; save the pluggable model, or depth edits alone for diffusers")
    for text in (edit for edit in plan.edits if isinstance(edit, TextStreamEdit)):
        inside = next((depth for depth in waiting if text.source < depth.first <= text.last), None)
        if inside is not None:
            why = f"{text.id} is plugged and {inside.id} inside of it is not: those blocks keep their text stream"
            raise PpclError(f"{why}, which the released layout cannot say; plug both or neither")


def _tensors(model: PluggableModel, plan: Plan, kept: list[Kept], layout: Layout) -> dict[str, torch.Tensor]:
    paths = graph_paths(graph_info(model.graph)["blocks"], plan, kept, layout)
    found = {translated(name, paths): tensor for name, tensor in model.graph_module().state_dict().items()}
    skeleton = weightless(diffusers_class(str(layout.config["_class_name"])), layout.config, model.dtype)
    must, may = expected(skeleton, layout)
    # The layout keeps what a block without a text stream has and does not use.
    whole, back = model.graph.state_dict(), originals({STACK: kept})
    found |= {name: whole[source] for name in may if (source := translated(name, back)) in whole}
    for name, shape in must.items():
        if name not in found or tuple(found[name].shape) != shape:
            raise PpclError(f"this mixture does not fit the released layout: {name} is missing or of another shape")
    return {name: found[name] for name in sorted({*must, *may} & set(found))}
