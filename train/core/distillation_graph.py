"""The distillation graph: the teacher's chain, and beside it every student, fed by the teacher (Sec. 3.3, 3.4)."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Graph, GraphModule, Node

from ppcl_fx.errors import PpclError, near
from ppcl_fx.ir.graphs import descendants, module_paths, users
from ppcl_fx.ir.meta import graph_info
from ppcl_fx.ir.stacks import block_regions, is_attention
from ppcl_fx.ir.switches import SWITCH, is_depth, is_switch, student_end, surface, switches
from ppcl_fx.passes.edits.depth import student_path
from ppcl_fx.passes.edits.ffn import projector_path
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, known
from ppcl_fx.tracing.guards import is_guard

if TYPE_CHECKING:
    from ppcl_fx.model.pluggable import PluggableModel

PARTS = {"depth": "students", "width": "projectors"}
"""What each stage trains: the pluggable graph's submodule of that name."""

STAGES = tuple(PARTS)
ORIGIN = "ppcl_origin"
"""In a distillation graph's node metas: the name of the node of the pluggable graph that gives the same value there."""

TRAINED = "ppcl_trained"
"""In the meta of a `pairs` node: the module path of what its edit trains."""
NONE: frozenset[Node] = frozenset()
"""No switch at its student."""


def pairs(edit: str, terms: tuple[tuple[str, torch.Tensor, torch.Tensor], ...]) -> None:
    """Mark what an edit's loss is made of; the training executor computes the loss here.

    Args:
        edit: the edit's id.
        terms: name, student value and teacher value, ``[batch, tokens, channels]`` each. ``image`` and ``text``
            are block outputs (Eq. 6, 11), ``z`` and ``linear.*`` what a projector aligns itself (Eq. 12),
            ``attention.*`` what attentions return.
    """


torch.fx.node.has_side_effect(pairs)


def loss_nodes(gm: GraphModule) -> list[Node]:
    """Return the `pairs` nodes of a distillation graph, in order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is pairs]


def train_only(model: PluggableModel, stage: str) -> None:
    """Give `requires_grad` to the parameters that a stage trains, and to no others: to none in a stage not of `STAGES`.

    Width edits on a depth student's block leave the student as it is: plugged without them, it is what "depth" made
    of it.
    """
    model.requires_grad_(False)
    for name, part in model.students_module.named_children():
        part.requires_grad_(name == PARTS.get(stage))


@dataclass(frozen=True)
class _Term:
    name: str
    student: Node
    teacher: Node
    active: frozenset[Node]


def distil(
    model: PluggableModel,
    stage: str,
    sequential: bool = False,
    attention: bool = False,
    only: Collection[str] | None = None,
    graph: GraphModule | None = None,
) -> GraphModule:
    """Return the graph that trains one stage's edits.

    Every switch upstream of a student is at its teacher, so each student gets the teacher's inputs and each
    interval's loss is independent. What comes after the last edit is not computed. Parameters are the model's. Raises
    PpclError where the stage is unknown, or the plan has no edit for it.

    Args:
        model: the pluggable model.
        stage: ``depth`` or ``width``.
        sequential: feed each student what the students before it give, the teacher's values staying the targets
            (the paper's control).
        attention: compare what the attentions of a depth edit's student and of the interval's last block return
            as well: terms ``attention.<number of the attention>.<number of the output>``. Not in the paper's loss.
        only: the ids of the edits to train; all of the stage if left out.
        graph: the model's pluggable graph for another kind of call (`PluggableModel.graph_for`).
    """
    if stage not in STAGES:
        raise PpclError(f"no distillation stage {stage!r}{near(stage, STAGES)}; choose depth or width")
    gm = model.graph if graph is None else graph
    edits = [edit for edit in model.plan.edits if isinstance(edit, DepthEdit) == (stage == "depth")]
    if not edits:
        raise PpclError(f"the plan has no edit for stage {stage}; train another stage")
    if only is not None:
        known([edit.id for edit in edits], list(only))
        edits = [edit for edit in edits if edit.id in only]
    upstream = NONE
    if sequential:
        chained = [e for e in model.plan.edits if stage == "width" or isinstance(e, DepthEdit)]
        upstream = frozenset(node for edit in chained for node in switches(gm, edit.id))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups = [(edit, _terms(gm, edit, upstream)) for edit in edits]
    if attention and stage == "depth":
        regions = block_regions(gm)
        groups = [(edit, terms + _attention_terms(gm, edit, regions, upstream)) for edit, terms in groups]
    groups.sort(key=lambda group: max(order[term.teacher] for term in group[1]))
    builder = _Builder(gm)
    for edit, terms in groups:
        values = []
        for term in terms:
            teacher = builder.value(term.teacher, NONE)  # first: the student's values are alive for less
            values.append((term.name, builder.value(term.student, term.active), teacher))
        end = builder.graph.call_function(pairs, (edit.id, tuple(values)))
        end.meta[TRAINED] = student_path(edit) if isinstance(edit, DepthEdit) else projector_path(edit.id)
    builder.graph.output(None)
    made = GraphModule(gm, builder.graph, class_name=f"{type(gm).__name__}Distil")
    made.meta = dict(gm.meta)
    return made


def _terms(gm: GraphModule, edit: Edit, upstream: frozenset[Node]) -> list[_Term]:
    """Return the loss terms of one edit, block by block."""
    mine = switches(gm, edit.id)
    if isinstance(edit, DepthEdit):
        return [_Term(_stream(node), _student(node), _teacher(node), upstream) for node in mine]
    terms: list[_Term] = []
    for block in dict.fromkeys(node.meta[SWITCH]["block"] for node in mine):
        here = [node for node in mine if node.meta[SWITCH]["block"] == block]
        # Only this block's switches: its neighbours stay with the teacher, as Eq. 11 has it.
        active = upstream | frozenset(here)
        for stream, (seen, target) in _block_ends(gm, block).items():
            if stream == "text" and not isinstance(edit, FfnEdit):
                continue  # the text state passes through: it is aligned itself, below, where a projector ends it
            if seen in descendants(here):
                terms.append(_Term(stream, seen, target, active))
        for node in here:
            name = _stream(node)
            if _student(node) in _projected(gm):
                value, target = student_end(gm, node) or (_student(node), _teacher(node))
                terms.append(_Term(name if name == "z" else f"linear.{name}", value, target, active))
    return terms


def _attention_terms(
    gm: GraphModule, edit: Edit, regions: Mapping[str, list[Node]], upstream: frozenset[Node]
) -> list[_Term]:
    """Return the pairs of corresponding attention outputs of an edit's student and its last teacher block."""
    assert isinstance(edit, DepthEdit)
    path = switches(gm, edit.id)[0].meta[SWITCH]["block"]
    mine = _attention_outputs(gm, [node for node in gm.graph.nodes if path in module_paths(node)])
    theirs = _attention_outputs(gm, regions.get(f"{edit.stack}.{edit.last}", []))
    return [_Term(f"attention.{n}.{i}", mine[n, i], theirs[n, i], upstream) for n, i in mine if (n, i) in theirs]


def _attention_outputs(gm: GraphModule, nodes: Iterable[Node]) -> dict[tuple[int, int], Node]:
    """Return (number of the attention, number of the output) -> the output's node, for outputs that are used."""
    found: dict[tuple[int, int], Node] = {}
    for number, node in enumerate(node for node in nodes if is_attention(gm, node)):
        if not isinstance(node.meta.get("val"), tuple | list):
            found[number, 0] = node
            continue
        for user in users(node):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                found.setdefault((number, user.args[1]), user)
    return found


def _block_ends(gm: GraphModule, path: str) -> dict[str, tuple[Node, Node]]:
    """Return, for each stream of a block, what its consumers see and the teacher's value to compare with."""
    ends: dict[str, tuple[Node, Node]] = {}
    for node in switches(gm):
        # The student of a depth edit stands for the last block of its interval.
        if node.meta[SWITCH]["block"] == path and is_depth(node):
            ends[_stream(node)] = (_student(node), _teacher(node))
    if ends:
        return ends
    for stream, raw in graph_info(gm)["ends"].get(path, {}).items():
        node = next(n for n in gm.graph.nodes if n.name == raw)
        ends[stream] = (surface(node), node)
    return ends


def _projected(gm: GraphModule) -> set[Node]:
    """Return the sums that end in a projector."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("projectors."):
            found |= set(node.users)
    return found


def _stream(node: Node) -> str:
    return str(node.meta[SWITCH]["stream"])


def _teacher(node: Node) -> Node:
    assert isinstance(node.args[0], Node)
    return node.args[0]


def _student(node: Node) -> Node:
    assert isinstance(node.args[1], Node)
    return node.args[1]


_Key = tuple[Node, frozenset[Node]]
"""A node of the pluggable graph, and the switches before it that are at their students."""


class _Builder:
    """Copies nodes of a pluggable graph into a new one, each switch resolved, each value once."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph = Graph(tracer_cls=None)
        self._done: dict[_Key, Node] = {}
        self._changed: dict[frozenset[Node], set[Node]] = {}
        inputs = gm.graph.find_nodes(op="placeholder")
        for node in inputs:
            self._copy((node, NONE), {})
        for node in gm.graph.nodes:
            if is_guard(node) and set(node.all_input_nodes) <= set(inputs):
                self._copy((node, NONE), {source: (source, NONE) for source in node.all_input_nodes})

    def value(self, node: Node, active: frozenset[Node]) -> Node:
        """Return the copy of a node with the given switches at their students and all others at their teachers."""
        todo = [self._key(node, active)]
        while todo:
            key = todo.pop()
            if key in self._done:
                continue
            sources = self._sources(*key)
            missing = [source for source in sources.values() if source not in self._done]
            if missing:
                todo += [key, *missing]
            elif is_switch(key[0]):
                self._done[key] = self._done[next(iter(sources.values()))]
            else:
                self._copy(key, sources)
        return self._done[self._key(node, active)]

    def _key(self, node: Node, active: frozenset[Node]) -> _Key:
        """A value that no active switch comes before is the teacher's own."""
        if active not in self._changed:
            self._changed[active] = descendants(active)
        return (node, active if node in self._changed[active] else NONE)

    def _sources(self, node: Node, active: frozenset[Node]) -> dict[Node, _Key]:
        chosen = [_student(node) if node in active else _teacher(node)] if is_switch(node) else node.all_input_nodes
        return {source: self._key(source, active) for source in chosen}

    def _copy(self, key: _Key, sources: Mapping[Node, _Key]) -> None:
        """Copy a node. Where no switch before it is at its student, the pluggable graph has the same value."""
        node, active = key
        copy = self._done[key] = self.graph.node_copy(node, lambda source: self._done[sources[source]])
        if not active:
            copy.meta[ORIGIN] = node.name
