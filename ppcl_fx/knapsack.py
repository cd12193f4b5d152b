"""The cheapest set of edits that saves enough parameters, where what one edit saves depends on the others.

Edits of different blocks save independently of each other; those of one block do not (a feed-forward without its text
stream saves less, the projector of a student saves nothing while the student is not plugged). What a set saves is
therefore a sum over its subsets of edits that touch (inclusion and exclusion): few, because few edits touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from ppcl_fx.plan import DepthEdit, Edit, FfnEdit, TextStreamEdit

Terms = Mapping[frozenset[str], int]
"""Edits that touch -> the parameters that all of them together save beyond what the smaller sets in it save."""
Touch = Mapping[str, frozenset[str]]
"""Edit -> the edits that change some block that it changes too."""


@dataclass(frozen=True)
class _Part:
    """A choice among the edits looked at so far."""

    saved: int
    cost: float
    edits: tuple[str, ...]


def touching(edits: Sequence[Edit]) -> dict[str, frozenset[str]]:
    """Return, for each edit, those that share a block with it, in an order in which neighbours come together.

    Text groups that meet in a block are one to the others: the text stream runs through both.
    """
    spans = {edit.id: (edit.stack, *_span(edit)) for edit in edits}
    chained = nx.Graph()
    chained.add_nodes_from(spans)
    groups = [edit.id for edit in edits if isinstance(edit, TextStreamEdit)]
    chained.add_edges_from((a, b) for a, b in itertools.combinations(groups, 2) if _meet(spans[a], spans[b]))
    wide = {}
    for members in nx.connected_components(chained):
        stack = spans[next(iter(members))][0]
        reach = (stack, min(spans[m][1] for m in members), max(spans[m][2] for m in members))
        wide |= dict.fromkeys(members, reach)
    order = sorted(spans, key=lambda name: (spans[name][0], spans[name][1], -spans[name][2]))
    return {one: frozenset(two for two in order if two != one and _meet(wide[one], wide[two])) for one in order}


def saving_terms(touch: Touch, params: Callable[[Sequence[str]], int]) -> dict[frozenset[str], int]:
    """Return the terms whose sum over the subsets of a set of edits is what the set saves.

    Args:
        touch: which edits touch.
        params: the exact number of parameters of the model with some edits plugged; asked once for each set of edits
            that all touch each other.
    """
    graph = nx.Graph()
    graph.add_nodes_from(touch)
    graph.add_edges_from((one, two) for one, others in touch.items() for two in others)
    whole = params(())
    terms: dict[frozenset[str], int] = {}
    for clique in nx.enumerate_all_cliques(graph):  # the smaller ones first
        edits = frozenset(clique)
        term = whole - params(sorted(edits)) - savings(edits, terms)
        if term:
            terms[edits] = term
    return terms


def savings(edits: Iterable[str], terms: Terms) -> int:
    """Return the number of parameters that a set of edits saves."""
    plugged = frozenset(edits)
    return sum(term for inside, term in terms.items() if inside <= plugged)


def cheapest(touch: Touch, terms: Terms, costs: Mapping[str, float], need: int) -> tuple[str, ...] | None:
    """Return the set of edits with the least summed cost of all that save `need` parameters, None where none does.

    Of equal costs the one with fewer edits. Exact: a dynamic program that looks at one edit after the other and keeps,
    for each choice among those that later ones still touch, every choice that no other one beats in savings and cost.

    Args:
        touch: the edits in the order to look at them, and which touch.
        terms: what they save (`saving_terms`).
        costs: edit -> its cost, not negative.
        need: parameters to save.
    """
    # Later edits can take back at most this much of what is saved: beyond it, more is not better.
    enough = need - sum(term for term in terms.values() if term < 0)
    order = list(touch)
    states: dict[frozenset[str], list[_Part]] = {frozenset(): [_Part(0, 0.0, ())]}
    for position, edit in enumerate(order):
        later = frozenset(order[position + 1 :])
        mine = [(inside - {edit}, term) for inside, term in terms.items() if edit in inside and not inside & later]
        grown: dict[frozenset[str], list[_Part]] = {}
        for live, parts in states.items():
            gain = sum(term for others, term in mine if others <= live)
            without = frozenset(one for one in live if touch[one] & later)
            within = without | {edit} if touch[edit] & later else without
            grown.setdefault(without, []).extend(parts)
            grown.setdefault(within, []).extend(
                _Part(min(part.saved + gain, enough), part.cost + costs[edit], (*part.edits, edit)) for part in parts
            )
        states = {live: _unbeaten(parts) for live, parts in grown.items()}
    good = [part for parts in states.values() for part in parts if part.saved >= need]
    return min(good, key=_price).edits if good else None


def _unbeaten(parts: Iterable[_Part]) -> list[_Part]:
    """Return the parts than which no other one saves as much for less."""
    kept: list[_Part] = []
    for part in sorted(parts, key=_price):
        if not kept or part.saved > kept[-1].saved:
            kept.append(part)
    return kept


def _price(part: _Part) -> tuple[float, int, int, tuple[str, ...]]:
    return (part.cost, len(part.edits), -part.saved, part.edits)


def _span(edit: Edit) -> tuple[int, int]:
    """Return the first and the last block that an edit changes or reads from."""
    if isinstance(edit, DepthEdit):
        return edit.first, edit.last
    if isinstance(edit, FfnEdit):
        return edit.block, edit.block
    return edit.source, edit.last


def _meet(one: tuple[str, int, int], two: tuple[str, int, int]) -> bool:
    return one[0] == two[0] and one[1] <= two[2] and two[1] <= one[2]
