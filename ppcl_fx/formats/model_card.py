"""The model card: ``README.md`` of a saved model, so that its folder can go to a hub as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, Plan, TextStreamEdit

NAME = "README.md"

HEAD = """---
library_name: ppcl-fx
pipeline_tag: text-to-image
tags:
- diffusers
- pruning
- distillation
---
"""
"""What hubs read. No license is named: it is the teacher's, which nobody here knows."""


def model_card(
    plan: Plan,
    plugged: Sequence[str],
    config: Mapping[str, Any],
    made: Mapping[str, Any],
    params: int,
    scores: Mapping[str, float] | None = None,
) -> str:
    """Return the text of a model card.

    It tells the plan, with its exact counts; the `plugged` edits, with which the model is loaded and has `params`
    parameters; how it was `made`, by ``version`` and ``passes``; and measured scores by name, if any.
    """
    name = config.get("_class_name", "a diffusion transformer")
    rows = [
        (f"`{e.id}`", _words(e), "yes" if e.id in plugged else "no", "" if e.damage is None else f"{e.damage:.4g}")
        for e in plan.edits
    ]
    parts = [
        HEAD,
        f"# A pruned {name}",
        f"{params:,} of the teacher's {plan.teacher_params:,} parameters ({_share(params, plan.teacher_params)}) as it "
        f"is loaded; with all {len(plan.edits)} edits {plan.params:,} ({_share(plan.params, plan.teacher_params)}). "
        "Teacher and student parts lie side by side; any mixture of them runs. How good one is has to be measured.",
        USE,
        "## Plan\n\n" + _table(("edit", "what", "plugged", "predicted damage"), rows),
    ]
    if plan.reason:
        parts.append("Why these:\n\n" + "\n".join(f"- {_plain(line)}" for line in plan.reason))
    if scores:
        parts.append("## Scores\n\n" + _table(("score", "value"), [(n, f"{v:.4g}") for n, v in scores.items()]))
    parts.append("## Provenance\n\n" + "\n".join(_provenance(plan, made)))
    return "\n\n".join(parts) + "\n"


USE = """```python
import ppcl_fx

transformer = ppcl_fx.load("this folder")       # goes into a diffusers pipeline as transformer=
transformer.plug(students=transformer.edits)    # or keep=0.7; students=[] is the teacher
```

`teacher/` is the teacher in diffusers' layout, `students.safetensors` holds the parts that replace it, `plan.json` says
which, and `ppcl.json` how the model was made. A LoRA of the teacher loads by the teacher's block numbers."""


def _words(edit: Edit) -> str:
    if isinstance(edit, DepthEdit):
        return f"blocks {edit.first} to {edit.last} become one"
    if isinstance(edit, FfnEdit):
        return f"linear projectors for the feed-forwards of block {edit.block}"
    assert isinstance(edit, TextStreamEdit)
    return f"blocks {edit.source + 1} to {edit.last} lose their text stream; it comes from block {edit.source}"


def _provenance(plan: Plan, made: Mapping[str, Any]) -> Iterator[str]:
    yield f"- made with ppcl-fx {_plain(str(made.get('version', '')))}"
    if plan.model:
        yield f"- the teacher's fingerprint: `{_plain(plan.model)}`"
    for entry in made.get("passes", []):
        options = ", ".join(f"{name} {value}" for name, value in entry.get("options", {}).items())
        yield f"- pass `{_plain(str(entry.get('name', '')))}`: {_plain(options)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Keep text that came from a file from being more than a line of text: no table cell, heading or tag of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "?"
