"""Captions and prompts in GenEval's six categories, over a small fixed vocabulary."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from ppcl_fx.errors import PpclError

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow")
CATEGORIES: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six categories, under GenEval's own names."""

NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
PAD = "<pad>"
MAX_WORDS = 10  # words in an encoded caption; shorter captions are padded
VOCABULARY: tuple[str, ...] = (
    *(PAD, "a", "and"),
    *SHAPES,
    *(shape + "s" for shape in SHAPES),
    *COLOURS,
    *NUMBERS.values(),
    *("left", "right", "of", "above", "below"),
)
_INDEX: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for, with one entry for each object."""

    text: str
    category: str
    shapes: tuple[str, ...]
    colours: tuple[str | None, ...]  # None leaves it free
    relation: str | None = None  # where the first object lies, seen from the second


_ORDERED = list(itertools.permutations(SHAPES, 2))
_ALL: dict[str, list[Prompt]] = {
    "single_object": [Prompt(f"a {shape}", "single_object", (shape,), (None,)) for shape in SHAPES],
    "two_object": [Prompt(f"a {a} and a {b}", "two_object", (a, b), (None, None)) for a, b in _ORDERED],
    "counting": [
        Prompt(f"{word} {shape}s", "counting", (shape,) * number, (None,) * number)
        for number, word in NUMBERS.items()
        for shape in SHAPES
    ],
    "colors": [
        Prompt(f"a {colour} {shape}", "colors", (shape,), (colour,))
        for colour, shape in itertools.product(COLOURS, SHAPES)
    ],
    "position": [
        Prompt(f"a {a} {relation} a {b}", "position", (a, b), (None, None), relation)
        for a, b in _ORDERED
        for relation in RELATIONS
    ],
    "color_attr": [
        Prompt(f"a {c} {a} and a {d} {b}", "color_attr", (a, b), (c, d))
        for a, b in _ORDERED
        for c, d in itertools.permutations(COLOURS, 2)
    ],
}
_BY_TEXT: dict[str, Prompt] = {prompt.text: prompt for group in _ALL.values() for prompt in group}


def every_prompt(category: str) -> tuple[Prompt, ...]:
    """Return all distinct prompts of a category. Raises PpclError where the category is not one of ``CATEGORIES``."""
    if category not in _ALL:
        raise PpclError(f"category {category!r} is unknown; use one of: {', '.join(CATEGORIES)}")
    return tuple(_ALL[category])


def prompts(category: str, count: int, seed: int) -> list[Prompt]:
    """Return ``count`` prompts of a category in a seeded order, each distinct one once before any comes again. Raises
    PpclError where the category is unknown, or ``count`` is negative.
    """
    if count < 0:
        raise PpclError(f"count is {count}; ask for 0 prompts or more")
    distinct = list(every_prompt(category))
    order = random.Random(f"{category}/{seed}")
    chosen: list[Prompt] = []
    while len(chosen) < count:
        order.shuffle(distinct)
        chosen.extend(distinct)
    return chosen[:count]


def parse(text: str) -> Prompt:
    """Return what a caption asks for. Raises PpclError where it is not one that this module writes."""
    if text not in _BY_TEXT:
        raise PpclError(f"caption {text!r} is unknown; write one like 'a red circle and a blue square'")
    return _BY_TEXT[text]


def encode(text: str) -> list[int]:
    """Return the ``MAX_WORDS`` vocabulary indices of a text; the empty text gives pad words only. Raises PpclError
    where a word is not in the vocabulary, or there are too many.
    """
    words = text.lower().split()
    if len(words) > MAX_WORDS:
        raise PpclError(f"prompt {text!r} has {len(words)} words; use at most {MAX_WORDS}")
    unknown = [word for word in words if word not in _INDEX or word == PAD]
    if unknown:
        known = ", ".join(VOCABULARY[1:])
        raise PpclError(f"prompt {text!r} has the unknown word {unknown[0]!r}; known words: {known}")
    return [_INDEX[word] for word in words] + [0] * (MAX_WORDS - len(words))
