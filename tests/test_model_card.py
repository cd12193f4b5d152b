"""The model card: what it says of a plan, and that hubs can read it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from ppcl_fx.formats.model_card import model_card
from ppcl_fx.model.rewrite import rewrite
from ppcl_fx.schema.plan import DepthEdit, FfnEdit, Plan, TextStreamEdit
from ppcl_fx.tracing import trace
from tests import models

STACK = "transformer_blocks"
PLAN = Plan(
    edits=[
        DepthEdit(stack=STACK, first=1, last=2, damage=0.12345),
        FfnEdit(stack=STACK, block=4),
        TextStreamEdit(stack=STACK, source=3, last=5),
    ],
    reason=["the least damage\n# for the budget", "a | b <script>"],
)


def test_a_saved_folder_has_a_card_with_plan_provenance_and_scores(tmp_path: Path) -> None:
    model = rewrite(trace(*models.tiny_qwen()), PLAN)
    depth = model.edits[0]
    folder = model.plug(students=[depth]).save(tmp_path / "student", scores={"geneval": 0.76321})
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "ppcl-fx"
    assert card.data.tags == ["diffusers", "pruning", "distillation"]
    assert "# A pruned QwenImageTransformer2DModel" in text
    assert f"{model.param_count():,} of the teacher's {model.teacher_params:,} parameters" in text
    assert f"with all 3 edits {model.plan.params:,}" in text
    assert "| `depth:transformer_blocks.1-2` | blocks 1 to 2 become one | yes | 0.1235 |" in text
    assert "| `ffn:transformer_blocks.4` | linear projectors for the feed-forwards of block 4 | no |  |" in text
    assert "blocks 4 to 5 lose their text stream; it comes from block 3" in text
    assert "| geneval | 0.7632 |" in text
    assert f"`{model.plan.model}`" in text
    assert "- pass `depth`: stack transformer_blocks, first 1, last 2, init first" in text


def test_words_from_a_plan_stay_words() -> None:
    text = model_card(PLAN, [], {}, {"version": "1"}, 0)
    assert "- the least damage # for the budget" in text
    assert "- a \\| b &lt;script>" in text
    assert "## Scores" not in text
