"""The pluggable model: teacher and student parts side by side, each edit switchable; saved as a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import nn
from torch.fx import GraphModule

from ppcl_fx._version import __version__
from ppcl_fx.calls.examples import build_call
from ppcl_fx.errors import PpclError
from ppcl_fx.formats.model_card import NAME as MODEL_CARD
from ppcl_fx.formats.model_card import model_card
from ppcl_fx.io import owned_folders as owned
from ppcl_fx.io.files import inside, new_folder, read_json, write_json, write_safetensors, write_text
from ppcl_fx.io.shards import ONE_FILE, Form, Shards, check_kind
from ppcl_fx.ir.dtypes import NAMES, DtypeName, dtype_name, kept_in_float32, other_dtypes, set_dtypes
from ppcl_fx.ir.graphs import parameter_count
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.model.face import PipelineModel
from ppcl_fx.model.mixtures import choose
from ppcl_fx.model.retrace import insert_edits
from ppcl_fx.model.sources import Source, is_released, open_source, transformer_class
from ppcl_fx.passes.edits.plug import mixture_draft, plugged
from ppcl_fx.passes.lowering.narrow import copy_again, is_copied, is_outdated
from ppcl_fx.schema.measured_effects import EFFECTS, Effects, load_effects
from ppcl_fx.schema.plan import Plan, known
from ppcl_fx.tracing import trace_saved

if TYPE_CHECKING:
    from ppcl_fx.formats.released import ReleasedModel

CARD = "ppcl.json"
PLAN = "plan.json"
STUDENTS = "students.safetensors"
TEACHER = "teacher"
FINETUNED = "finetuned.json"


class StudentManifest(BaseModel):
    """What a saved pluggable model says about itself.

    Attributes:
        plugged: the edits that were plugged when it was saved.
        example: the arguments that it was traced with, as `ppcl_fx.calls.examples.describe` writes them.
        made: how it was made: the passes with their options, the version.
        teacher: the fingerprint of the teacher as it was saved, where that is not the one that the plan was made for:
            the model was moved to another dtype. Empty otherwise.
        dtype: the teacher's main dtype (`ppcl_fx.ir.dtypes.main_dtype`); empty in folders of older versions.
        dtypes: the dtypes of its tensors that loading in that dtype would not give (`ppcl_fx.ir.dtypes.other_dtypes`).
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    kind: Literal["pluggable"] = "pluggable"
    plugged: list[str]
    example: dict[str, JsonValue]
    made: dict[str, JsonValue]
    teacher: str = ""
    dtype: DtypeName | Literal[""] = ""
    dtypes: dict[str, DtypeName] = {}

    def teacher_dtypes(self) -> dict[str, torch.dtype]:
        """Return `dtypes` as dtypes."""
        return {name: NAMES[dtype] for name, dtype in self.dtypes.items()}


class PluggableModel(PipelineModel):
    """A teacher and every student part of a plan; behaves like the transformer it was made from.

    Args:
        graph: a pluggable graph, as `ppcl_fx.model.rewrite.insert_edits` makes it.
        plan: the plan it was made by.

    Attributes:
        effects: what each student does to the output, where it was measured (`ppcl_fx.train.metrics.effects`).
    """

    effects: Effects | None
    _views: dict[tuple[frozenset[str], GraphModule], GraphModule]
    _counts: dict[frozenset[str], int]
    _copied: list[torch.Tensor]

    def __init__(self, graph: GraphModule, plan: Plan) -> None:
        super().__init__()
        self.graph = graph
        self._plan = plan
        self._plan_counted = False
        self.effects = None
        self.students: tuple[str, ...] = ()
        self.weights_changed()

    # ---- what it is --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan, with the exact parameter counts of the teacher and of the model with every edit plugged."""
        if not self._plan_counted:
            counts = {"teacher_params": self.teacher_params, "params": self.param_count(self.edits)}
            self._plan, self._plan_counted = self._plan.model_copy(update=counts), True
        return self._plan

    @property
    def edits(self) -> list[str]:
        """The ids of all edits, in the plan's order."""
        return self._plan.ids

    @property
    def students_module(self) -> nn.Module:
        """The student parts alone (``students.*`` and ``projectors.*``): what distillation trains."""
        parts = nn.Module()
        for name in ("students", "projectors"):
            if hasattr(self.graph, name):
                parts.add_module(name, getattr(self.graph, name))
        return parts

    @property
    def teacher_params(self) -> int:
        """Number of parameters of the teacher."""
        return self.param_count(())

    def param_count(self, students: Sequence[str] | None = None) -> int:
        """Return the exact number of parameters of a mixture, by default of the one plugged now."""
        wanted = frozenset(self.students if students is None else students)
        if wanted not in self._counts:
            self._counts[wanted] = parameter_count(mixture_draft(self.graph, wanted))
        return self._counts[wanted]

    # ---- plugging ----------------------------------------------------------------------------------------------

    def plug(self, keep: float | None = None, *, students: Sequence[str] | None = None) -> PluggableModel:
        """Choose a mixture of teacher and student parts, and return the model itself.

        Args:
            keep: share of the teacher's parameters that may stay, in (0, 1]. With measured `effects`, plugs the
                edits with the least sum of them that meets the budget. Without, starts from all students and swaps
                those back to their teacher that the plan predicts to do most damage, as long as the budget holds.
            students: the ids of the edits to plug; all others go back to the teacher.

        Raises:
            PpclError: neither or both are given, an id is unknown, or the plan cannot reach the share.
        """
        if (keep is None) == (students is None):
            raise PpclError("plug takes either keep=... or students=[...]; give one of them")
        if students is None:
            assert keep is not None
            students = choose(self, keep)
        else:
            known(self.edits, students)
        chosen = tuple(edit for edit in self.edits if edit in set(students))
        # Before it is the choice: a mixture that cannot be made is no choice.
        self._view(frozenset(chosen), self.graph)
        self.students = chosen
        return self

    def graph_module(self) -> GraphModule:
        """Return the current mixture as a plain graph module: parameters shared, nothing unused left in it."""
        return self._view(frozenset(self.students), self.graph)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run the current mixture on the transformer's arguments; GuardError where it cannot be traced for them."""
        self._check_class()
        given = self._take_scale(dict(zip(graph_info(self.graph)["signature"], args, strict=False)) | kwargs)
        graph, bound = self._bound(given)
        result = self._runner(self._view(frozenset(self.students), graph))(**bound)
        if not return_dict:
            return result
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=result[0])

    def _view(self, students: frozenset[str], graph: GraphModule) -> GraphModule:
        if (students, graph) not in self._views:
            # One mixture at a time: narrowed layers are views of weights that a move may replace.
            for key in [key for key in self._views if key[0] != students]:
                del self._views[key]
            self._views[students, graph] = view = plugged(graph, students).train(self.training)
            if not graph_info(graph).get("alone"):
                graph_info(view)["mixture"] = (self._plan, sorted(students))
            copied = [tensor for view in self._views.values() for tensor in view.parameters() if is_copied(tensor)]
            self.__dict__["_copied"] = copied
        if not torch.compiler.is_compiling():
            for tensor in filter(is_outdated, self._copied):
                copy_again(tensor)
        return self._views[students, graph]

    def weights_changed(self) -> None:
        """Make the present mixture anew; for whoever puts other tensors in the place of weights."""
        # Plain containers, so that torch does not take what is in them for its own.
        self.__dict__.update(_views={}, _counts={}, _copied=[])
        # Now, and not at the next call: inside of torch.compile nothing can be made.
        self.graph_module()

    def _weights_written(self) -> None:
        if self._offload is not None:  # diffusers' hooks may hold weights of their own
            self.weights_changed()
        for tensor in self._copied:
            copy_again(tensor)

    def train(self, mode: bool = True) -> PluggableModel:
        """Set the mode of the model and of its present mixture, as `torch.nn.Module.train`."""
        super().train(mode)
        for view in self._views.values():
            view.train(mode)
        return self

    # ---- saving ------------------------------------------------------------------------------------------------

    def save(
        self, folder: str | Path, *, overwrite: bool = False, scores: Mapping[str, float] | None = None
    ) -> Path:
        """Write the model: ``teacher/`` (a diffusers folder), the students' weights, the plan, a card, a README.

        Args:
            folder: where to; written beside and renamed.
            overwrite: replace a saved model that exists, and what training and export wrote into its folder.
            scores: measured scores by name, for the model card.

        Raises:
            PpclError: the folder exists (with `overwrite`: holds anything else), cannot be written, or the teacher is
                not a diffusers model.
        """
        return self._save(Path(folder), owned.STUDENT if overwrite else None, scores)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Write the model as `save` does, for ``pipeline.save_pretrained``; only a saved model is replaced."""
        self._save(Path(save_directory), owned.SAVED)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Load what `save` wrote; as `ppcl_fx.load`. Of the options only ``dtype`` and ``torch_dtype`` count."""
        return load(folder, dtype=options.get("dtype", options.get("torch_dtype")))

    def _save(self, folder: Path, replaces: owned.Kind | None, scores: Mapping[str, float] | None = None) -> Path:
        with new_folder(folder, replaces=replaces) as beside:
            self.save_head(beside, scores)
            teacher, students = self._split()
            write_safetensors(beside / TEACHER / ONE_FILE, teacher, {"format": "pt"}, digests=True)
            write_safetensors(beside / STUDENTS, students, digests=True)
            stored = open_source(str(beside / TEACHER)).checkpoint()
            if self.plan.model and stored.known_as(self.plan.model) is None:
                card = read_json(beside / CARD, StudentManifest)
                write_json(beside / CARD, card.model_copy(update={"teacher": stored.fingerprint}))
        return folder

    def save_head(self, folder: Path, scores: Mapping[str, float] | None = None) -> None:
        """Write what a saved model has beside its weights into an empty folder: cards, plan, the teacher's config."""
        import diffusers

        info = graph_info(self.graph)
        if info.get("alone"):
            raise PpclError(f"{info['alone']} has no teacher to save; its own folder is all there is")
        if not info.get("config", {}).get("_class_name"):
            raise PpclError("the teacher has no diffusers configuration, so it cannot be saved; save its graph instead")
        name = info["config"]["_class_name"]
        if not hasattr(diffusers, name):
            raise PpclError(f"the teacher's class {name} is none of diffusers, so it cannot be saved; save its graph")
        card = StudentManifest(
            plugged=list(self.students),
            example=info["example"],
            made={"version": __version__, "passes": info.get("passes", [])},
            dtype=dtype_name(self.dtype),
            dtypes={n: dtype for n, dtype in other_dtypes(self.graph, info["unused"]).items() if not is_students(n)},
        )
        write_json(folder / CARD, card)
        write_json(folder / PLAN, self.plan)
        if self.effects is not None:
            write_json(folder / EFFECTS, self.effects)
        words = model_card(self.plan, card.plugged, info["config"], card.made, self.param_count(), scores)
        write_text(folder / MODEL_CARD, words)
        (folder / TEACHER).mkdir()
        write_json(folder / TEACHER / "config.json", info["config"])

    def save_students(self, folder: str | Path) -> None:
        """Replace the students' weights, and their measured effects, in a folder that `save` wrote."""
        read_json(inside(folder, CARD), StudentManifest)
        # In this order: effects of other weights are not used, whenever this is killed.
        write_safetensors(inside(folder, STUDENTS), self._split()[1], digests=True)
        if self.effects is not None:
            write_json(inside(folder, EFFECTS), self.effects)
        else:
            inside(folder, EFFECTS).unlink(missing_ok=True)

    def _split(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        self.require_no_lora("saving")
        state = self.graph.state_dict()
        mine = {name: state.pop(name) for name in list(state) if is_students(name)}
        return {**state, **graph_info(self.graph)["unused"]}, mine


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> PluggableModel | ReleasedModel:
    """Load what `PluggableModel.save` wrote, a fine-tuned model beside it, or a released checkpoint.

    No code from the folder is run.

    Args:
        folder: the folder.
        dtype: dtype of the weights, but for those that the model's class keeps in float32, as diffusers loads it; by
            default each weight has the dtype that it was saved with.

    Returns:
        A pluggable model; of a fine-tuned one, a pluggable model without edits; of a released checkpoint, which has no
        teacher, a model of one size (`ppcl_fx.formats.released`).

    Raises:
        PpclError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not (folder / CARD).exists() and is_released(folder):
        from ppcl_fx.formats import released

        return released.load(folder, dtype=dtype)
    if (folder / FINETUNED).is_file():
        return _finetuned(folder, dtype)
    card, plan, students = open_head(folder)
    source, saved = open_teacher(folder, card, plan)
    teacher = source.transformer(dtype=dtype or saved)
    if dtype is None and card.dtypes:
        set_dtypes(teacher, card.teacher_dtypes(), Shards.open(inside(folder, TEACHER)).tensor)
    example = build_call(card.example, {saved: dtype or saved}, str(folder / CARD))
    model = PluggableModel(insert_edits(trace_saved(teacher, example, folder / CARD), plan), plan)
    check_students(folder, students, model.graph)
    weights = students.tensors()
    if dtype is None:
        set_dtypes(model.students_module, {name: tensor.dtype for name, tensor in weights.items()})
    model.students_module.load_state_dict(weights)
    model.effects = load_effects(folder, model.plan, weights)
    return model.plug(students=card.plugged).eval()


def _finetuned(folder: Path, dtype: torch.dtype | None) -> PluggableModel:
    from ppcl_fx.model.student_folder import load_finetuned

    student = load(folder.absolute().parent, dtype=dtype)
    if not isinstance(student, PluggableModel):
        raise PpclError(f"{folder}: stands beside no pluggable model; put it back into the folder that it was made in")
    graph = load_finetuned(student, folder)
    graph_info(graph)["alone"] = "a fine-tuned model"
    return PluggableModel(graph, Plan()).eval()


def open_head(folder: Path) -> tuple[StudentManifest, Plan, Shards]:
    """Read what a saved model says about itself, and open its students' weights."""
    card = read_json(inside(folder, CARD), StudentManifest)
    return card, read_json(inside(folder, PLAN), Plan), Shards.one_file(inside(folder, STUDENTS))


def open_teacher(folder: Path, card: StudentManifest, plan: Plan) -> tuple[Source, torch.dtype]:
    """Return the teacher of a saved model, and the model's main dtype; PpclError where it is not the plan's."""
    source = open_source(str(inside(folder, TEACHER)))
    wanted = card.teacher or plan.model
    if wanted and source.checkpoint().known_as(wanted) is None:
        raise PpclError(
            f"{folder / TEACHER}: not the model that {PLAN} was made for (its fingerprint is {wanted[:12]}): "
            "weights or config.json were exchanged; copy the whole folder again"
        )
    if card.dtype:
        return source, NAMES[card.dtype]
    # Older versions did not write it down: it is that of the students.
    students = Shards.one_file(inside(folder, STUDENTS))
    kept = kept_in_float32(transformer_class(source.folder / "config.json"))
    return source, (students if students.stored else Shards.open(source.folder)).dtype(kept)


def check_students(folder: Path, students: Shards, graph: GraphModule) -> None:
    """Raise `PpclError` unless a saved model's students' file has the plan's tensors and no others."""
    path, wanted = folder / STUDENTS, student_forms(graph)
    for name, (dtype, shape) in wanted.items():
        if name not in students.stored or students.stored[name].shape != shape:
            raise PpclError(f"{path} does not fit the plan: {name} is missing or of another shape; save again")
        check_kind(students.stored[name].dtype, torch.empty(0, dtype=dtype), name, path)
    extra = sorted(set(students.stored) - set(wanted))
    if extra:
        raise PpclError(f"{path} does not fit the plan: it holds {extra[0]}, which no edit has; save again")


def student_forms(graph: GraphModule) -> dict[str, Form]:
    """Return dtype and shape of each tensor of a pluggable graph's students and projectors."""
    return {n: (tensor.dtype, tuple(tensor.shape)) for n, tensor in graph.state_dict().items() if is_students(n)}


def is_students(name: str) -> bool:
    """Tell whether a tensor or a module of a pluggable graph is of its students or projectors, by its name."""
    return name.split(".")[0] in ("students", "projectors")
