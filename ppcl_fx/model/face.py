"""What pipelines ask of their transformer beside calling it, answered as the teacher's class does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ppcl_fx.calls.kinds import REFUSALS, kind_of
from ppcl_fx.errors import GuardError, PpclError
from ppcl_fx.ir.dtypes import main_dtype
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.partition import carve, grouped, parts
from ppcl_fx.lora.methods import LoraModel
from ppcl_fx.model.retrace import dtypes_of, retraced, sparing_complex
from ppcl_fx.model.sources import diffusers_class
from ppcl_fx.schema.plan import Plan
from ppcl_fx.tracing import Unused, bind, graph_for
from ppcl_fx.tracing.meta_model import skeleton

if TYPE_CHECKING:

    class _DiffusersModel(nn.Module):
        """Typed in part only."""

else:
    from diffusers import ModelMixin as _DiffusersModel


def _refusal(what: str) -> Callable[..., Any]:
    """Return a method for what cannot be right."""
    return lambda self, *args, **kwargs: self._refuse(what)


class Uncached:
    """A transformer without caches of its own; pipelines name the guidance branch of a call all the same."""

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Do nothing: the branch, and where the loop stands, are told to caches that this model does not have."""
        del name, where
        yield


class PipelineFace(Uncached, _DiffusersModel):
    """A model of diffusers by its class that computes in its own way and answers like the class it was traced from.

    What the model itself does not have (``model.in_channels``, ``model.rope``, ``model.build_attention_mask(...)``) is
    asked of its teacher's class, built anew from the configuration over the weights that are there. That copy is for
    reading. A change to it (a hook on a block, a cache, fused projections) would do nothing, so it is refused.
    """

    KIND = "a pluggable model"
    """What the model is called in messages."""

    compile_repeated_blocks = _refusal(
        "no blocks to compile: they are parts of one graph; compile it whole: torch.compile(model)"
    )
    enable_layerwise_casting = _refusal(
        "no layerwise casting: its graph was traced with one dtype; use to(torch.bfloat16)"
    )
    enable_group_offload = _refusal("no weights of its own to offload; leave it out")
    load_lora_adapter = _refusal(
        "no place for a LoRA; load it into the pluggable model, fuse it there, and save or export that"
    )

    def _refuse(self, what: str) -> NoReturn:
        raise PpclError(f"{self.KIND} has {what}")

    # ---- the teacher's class -----------------------------------------------------------------------------------

    def _class_config(self) -> Mapping[str, Any] | None:
        """Return the configuration that the teacher's class is built from; None as long as the model is not made."""
        raise NotImplementedError

    def _class_weights(self) -> Mapping[str, torch.Tensor]:
        """Return parameters and buffers by the teacher's names."""
        return {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            made = None if name.startswith("__") else self._class_copy()
            if made is None:
                raise
        value = getattr(made.model, name)
        made.shown |= isinstance(value, nn.Module)
        if not inspect.ismethod(value) or value.__self__ is not made.model:
            return value

        @wraps(value)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)  # it may compute something, and may not change the model
            self._check_class(f"{value.__name__}() changes", shown=True)
            return result

        return watched

    def _class_copy(self) -> _Made | None:
        """Return the teacher's class, built once; None where it is no class of diffusers, or refuses to be built."""
        made: _Made | None = self.__dict__.get("_made")
        config = self._class_config() if made is None else None
        if config is None:
            return made
        try:
            model = skeleton(diffusers_class(str(config.get("_class_name"))), config, self.dtype)
        except PpclError:
            return None  # whoever asks by `hasattr` gets an answer, whatever the class is
        weights = self._class_weights()
        for path, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        here = tensor if tensor.is_meta else tensor.to(self.device)
                        held[name] = weights.get(f"{path}.{name}" if path else name, here)
        made = self.__dict__["_made"] = _Made(model)
        return made

    def _check_class(self, what: str = "somebody changed", *, shown: bool = False) -> None:
        """Raise where a copy of the teacher's class that was handed out was changed; the copy is thrown away.

        `what` says who changed it; `shown` lets it look also where no module was handed out.
        """
        made = None if torch.compiler.is_compiling() else self.__dict__.get("_made")
        changed = made.changed() if made is not None and (shown or made.shown) else None
        if changed is not None:
            self._forget_class()
            raise PpclError(
                f"{what} {changed} of the transformer's class, and {self.KIND} does not compute by that: it would do "
                "nothing, and was taken back; leave it out"
            )

    def _forget_class(self) -> None:
        """Build the class anew when it is asked for something next."""
        self.__dict__.pop("_made", None)


class _Made:
    """The teacher's class as it was built, and how it was then; `shown` once a module of it was handed out."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shown, self._before = model, False, _structure(model)

    def changed(self) -> str | None:
        """Return the name of what is not as it was, or None."""
        before, now = self._before, _structure(self.model)
        odd = next((key for key in now | before if not _same(now.get(key), before.get(key))), None)
        return None if odd is None else repr(".".join(odd).lstrip("."))


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (bool, int, float, str)) and type(one) is type(other) and one == other)


def _structure(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return what a model computes by: modules, parameters, functions, hooks, settings; not the tensors it keeps."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters"):
                found |= {(path, key): item for key, item in value.items()}
            elif name.endswith("_hooks"):
                found |= {(path, f"{name}[{key}]"): item for key, item in value.items()}
            elif callable(value) or isinstance(value, (bool, int, float, str)):
                found[path, name] = value
    return found


class Pieces(nn.Module):
    """A mixture's graph cut at its blocks, over the same modules and parameters; computes what the graph computes.

    Diffusers' hooks move a block's weights to the accelerator when the block is called. In a mixture no block is: its
    nodes lie open in one graph. The pieces are modules that such hooks can hang on.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        self.inputs: list[list[str]] = []
        self.outputs: list[list[str]] = []
        pieces = grouped(parts(node for node in gm.graph.nodes if node.op != "placeholder"))
        self.blocks = nn.ModuleList(self._piece(gm, piece) for piece in pieces)
        last = {name: at for at, names in enumerate(self.inputs) for name in names}
        self.dead = [[name for name, end in last.items() if end == at] for at in range(len(pieces))]
        self.train(gm.training)

    def _piece(self, gm: GraphModule, nodes: list[Node]) -> GraphModule:
        carved, output = carve(nodes), gm.graph.output_node()
        final = nodes[-1] is output
        results = output.args[0] if final else tuple(carved.outputs)
        carved.graph.output(map_arg(results, carved.values.__getitem__))
        self.inputs.append([source.name for source in carved.inputs])
        self.outputs.append([] if final else [node.name for node in carved.outputs])
        return GraphModule(gm, carved.graph, class_name="Piece")

    def forward(self, **inputs: Any) -> Any:
        """Run the pieces one after the other, forgetting what no later one reads."""
        values = dict(inputs)
        result: Any = None
        for at, block in enumerate(self.blocks):
            result = block(*(values[name] for name in self.inputs[at]))
            values.update(zip(self.outputs[at], result, strict=False))
            for name in self.dead[at]:
                values.pop(name, None)
        return result


class GroupOffload(nn.Module):
    """What a model that computes by one graph is for ``enable_group_offload``."""

    _offload: Mapping[str, Any] | None = None
    """The arguments of ``diffusers.hooks.apply_group_offloading``."""
    weights_changed: Callable[[], None]
    """Forgets views of the weights."""

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Keep the weights on `offload_device` and compute block by block on `onload_device`.

        `options` are as diffusers takes them (``num_blocks_per_group``, ``use_stream``, ``non_blocking`` ...).

        Raises:
            PpclError: offloading by leaves or by other modules than the graph's blocks, or it is offloaded already.
        """
        from diffusers.hooks import group_offloading as own

        if self._offload is not None:
            raise PpclError("the model is offloaded already; load it again to offload it in another way")
        if offload_type != "block_level":
            raise PpclError(
                f"a pluggable model is offloaded by blocks, not by {str(offload_type)!r}: some of its weights belong "
                "to no leaf module; use offload_type='block_level', num_blocks_per_group=1"
            )
        if options.get("block_modules") is not None:
            raise PpclError("the blocks of a pluggable model are known from its graph; leave block_modules out")
        onto, off = torch.device(onload_device), torch.device(offload_device)
        self.to(off)
        # Diffusers' mark on a model whose parts are offloaded: by it pipelines find the device to compute on.
        config = own.GroupOffloadingConfig(onto, off, own.GroupOffloadingType.BLOCK_LEVEL, False, False, False)
        nothing = own.ModuleGroup([], off, onto, offload_leader=self, onload_leader=self)
        own._apply_group_offloading_hook(self, nothing, config=config)
        wanted = {name: value for name, value in options.items() if value is not None}
        where = {"onload_device": onto, "offload_device": off, "offload_type": offload_type}
        self._offload = {"num_blocks_per_group": 1, **wanted, **where}
        self.weights_changed()

    def require_not_offloaded(self) -> None:
        """Raise `PpclError` where the weights are in the hands of diffusers' hooks: nobody else may move them."""
        if self._offload is not None:
            raise PpclError("the model is offloaded by blocks, so it is not moved; load it again to move it")

    def _runner(self, gm: GraphModule) -> GraphModule | Pieces:
        """Return what runs a graph: itself, or its pieces with offloading hooks."""
        if self._offload is None:
            return gm
        # One for each kind of call, as long as its graph is there.
        kept: WeakKeyDictionary[GraphModule, Pieces] = self.__dict__.setdefault("_pieces", WeakKeyDictionary())
        if gm not in kept:
            from diffusers.hooks import apply_group_offloading

            kept[gm] = Pieces(gm)
            apply_group_offloading(kept[gm], **self._offload)
        return kept[gm]


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
        """Move as `torch.nn.Module.to`; another dtype traces the model again, so the teacher must be of diffusers."""
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
        """Trace the model again for another kind of call, with the weights and edits that it has, and return it.

        A call of a kind that is new is traced by itself. This chooses the kind that is saved with the model, and that
        it is exported for: with a ControlNet's residuals, with other inputs in another dtype, with a mask. Only shapes
        and dtypes of tensors count. Nothing changes where such a call cannot be traced.
        """
        self.graph = retraced(self.graph, self._plan, example=example)
        self._adapters.moved(self.graph)
        self.weights_changed()
        return self

    def graph_for(self, kwargs: Mapping[str, Any]) -> GraphModule:
        """Return the pluggable graph for calls of one kind; a new one is traced, or GuardError says why not."""
        return self._bound(kwargs)[0]

    def _bound(self, kwargs: Mapping[str, Any]) -> tuple[GraphModule, dict[str, Any]]:
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
        """Choose the kernels of every attention; those that lie open in a mixture's graph are traced again."""
        super().set_attention_backend(backend)  # type: ignore[misc]
        self.weights_changed()

    def reset_attention_backend(self) -> None:
        """Go back to the kernels of torch."""
        super().reset_attention_backend()  # type: ignore[misc]
        self.weights_changed()
