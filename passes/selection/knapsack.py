"""The cheapest set of edits that saves enough parameters, where what one edit saves depends on the others.

Edits of different blocks save independently of each other; those of one block do not (a feed-forward without its text
stream saves less, the projector of a student saves nothing while the student is not plugged). What a set saves is
therefore a sum over its subsets of edits that touch (inclusion and exclusion): few, because few edits touch. Text
groups reach furthest: once a group is plugged, the last block before its end that still has a text stream may lose the
tail of it, and which block that is depends on all intervals within the group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import networkx as nx

from ppcl_fx.passes.selection.sensitivity import span
from ppcl_fx.schema.plan import DepthEdit, Edit, FfnEdit, TextStreamEdit

Terms = Mapping[frozenset[str], int]
"""Edits that touch -> the parameters that all of them together save beyond what the smaller sets in it save."""
Params = Callable[[Sequence[str]], int]
Touch = Mapping[str, frozenset[str]]
"""Edit -> the edits whose savings depend on it, and on which its own depend."""
COUNTED = 128
"""Sets of three and more edits are counted beforehand up to so many sets in all, larger ones when they are proposed."""
TRIES = 64
"""How often a choice is made again with what counting the one before has shown."""


class _Part(NamedTuple):
    """A choice among the edits looked at so far."""

    saved: int
    cost: float
    edits: tuple[str, ...]


def touching(edits: Sequence[Edit]) -> dict[str, frozenset[str]]:
    """Return, for each edit, those that share a block with it, in an order in which neighbours come together.

    Text groups that meet in a block are one to the others: the text stream runs through both. Within it the intervals
    touch each other, and the feed-forward of a group's source touches them.
    """
    spans = {edit.id: (edit.stack, *span(edit)) for edit in edits}
    chained = nx.Graph()
    chained.add_nodes_from(spans)
    groups = [edit.id for edit in edits if isinstance(edit, TextStreamEdit)]
    chained.add_edges_from((a, b) for a, b in itertools.combinations(groups, 2) if _meet(spans[a], spans[b]))
    wide = dict(spans)
    order = sorted(spans, key=lambda name: (spans[name][0], spans[name][1], -spans[name][2]))
    touch = nx.Graph()
    touch.add_nodes_from(order)
    for members in nx.connected_components(chained):
        stack = spans[next(iter(members))][0]
        reach = (stack, min(spans[m][1] for m in members), max(spans[m][2] for m in members))
        if members <= set(groups):
            wide |= dict.fromkeys(members, reach)
            sources = {spans[m][1] for m in members}
            met = [edit for edit in edits if _meet(reach, spans[edit.id])]
            far = [e.id for e in met if isinstance(e, DepthEdit) or (isinstance(e, FfnEdit) and e.block in sources)]
            touch.add_edges_from(itertools.combinations(far, 2))
    touch.add_edges_from((a, b) for a, b in itertools.combinations(order, 2) if _meet(wide[a], wide[b]))
    return {edit: frozenset(touch[edit]) for edit in order}


def least_within(
    touch: Touch, params: Params, costs: Mapping[str, float], budget: int, counted: int = COUNTED
) -> tuple[str, ...] | None:
    """Return the edits with the least summed cost that leave at most `budget` parameters; see `cheapest`.

    What is returned has been counted. No set is cheaper, unless more than `counted` sets of edits touch, which takes a
    text group of six intervals: then what the larger sets save is learnt from the choices that are counted, and a
    cheaper set that saves more than was known may be missed. `params` gives the exact number of parameters of the model
    with some edits plugged; costs are not negative. Sets of one and two edits are always counted.
    """
    whole = params(())
    terms = saving_terms(touch, params, counted)
    for _ in range(TRIES):
        found = cheapest(touch, terms, costs, whole - budget)
        if found is None or params(found) <= budget:
            return found
        before = dict(terms)
        for clique in nx.find_cliques(nx.from_dict_of_lists(touch)):
            inside = frozenset(clique) & frozenset(found)
            more = whole - params(sorted(inside)) - savings(inside, terms)
            if more:
                terms[inside] = terms.get(inside, 0) + more
        if terms == before:
            return None
    return None


def saving_terms(touch: Touch, params: Params, counted: int = COUNTED) -> dict[frozenset[str], int]:
    """Return the terms whose sum over the subsets of a set of edits is what the set saves (see `least_within`)."""
    whole = params(())
    terms: dict[frozenset[str], int] = {}
    for number, clique in enumerate(nx.enumerate_all_cliques(nx.from_dict_of_lists(touch))):  # the smaller ones first
        if len(clique) > 2 and number >= counted:
            break
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


def _meet(one: tuple[str, int, int], two: tuple[str, int, int]) -> bool:
    return one[0] == two[0] and one[1] <= two[2] and two[1] <= one[2]
