"""Captions: six categories over a fixed vocabulary, the same for the same seed."""

from __future__ import annotations

import pytest

from ppcl_fx.errors import PpclError
from ppcl_fx.shapes.captions import (
    CATEGORIES,
    MAX_WORDS,
    VOCABULARY,
    encode,
    every_prompt,
    parse,
    prompts,
)

DISTINCT = {
    "single_object": 3,
    "two_object": 6,
    "counting": 9,
    "colors": 12,
    "position": 24,
    "color_attr": 72,
}


def test_each_category_has_its_distinct_prompts() -> None:
    assert {name: len({p.text for p in every_prompt(name)}) for name in CATEGORIES} == DISTINCT


def test_every_caption_is_short_and_in_the_vocabulary() -> None:
    for name in CATEGORIES:
        for prompt in every_prompt(name):
            ids = encode(prompt.text)
            assert len(ids) == MAX_WORDS
            assert " ".join(VOCABULARY[i] for i in ids if i) == prompt.text
            assert parse(prompt.text) == prompt


def test_the_empty_caption_is_all_pads() -> None:
    assert encode("") == [0] * MAX_WORDS


def test_prompts_repeat_with_the_seed_and_are_balanced() -> None:
    for name in CATEGORIES:
        chosen = prompts(name, 80, 7)
        assert chosen == prompts(name, 80, 7) != prompts(name, 80, 8)
        texts = [prompt.text for prompt in chosen]
        counts = [texts.count(prompt.text) for prompt in every_prompt(name)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [("a purple circle", "purple"), ("a " * 11, "at most 10"), ("<pad>", "<pad>")],
)
def test_bad_prompts_are_refused_in_one_line(text: str, hint: str) -> None:
    with pytest.raises(PpclError, match=hint) as caught:
        encode(text)
    assert "\n" not in str(caught.value)


def test_unknown_categories_and_counts_are_refused() -> None:
    with pytest.raises(PpclError, match="use one of"):
        prompts("colours", 1, 0)
    with pytest.raises(PpclError, match="0 prompts or more"):
        prompts("colors", -1, 0)
    with pytest.raises(PpclError, match="unknown"):
        parse("a circle circle")
