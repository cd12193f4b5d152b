"""From an analysis to a plan for a budget. How the edits are chosen is a rule; rules are registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ppcl_fx.errors import PpclError, near
from ppcl_fx.passes.options import RULE_NAMES, RewriteConfig
from ppcl_fx.passes.selection.savings import saved
from ppcl_fx.schema.analysis import Redundancy
from ppcl_fx.schema.costs import Costs
from ppcl_fx.schema.plan import Edit, Plan


@dataclass(frozen=True)
class Options:
    """What a rule may be told.

    `budget` is in parameters that may stay; `stream` is the one whose candidates count, `width`, `ffn`, `text_cka` and
    `init` are as in `RewriteConfig`; `costs` are what each block costs where the budget is one of time, `milliseconds`.
    """

    budget: int
    stream: str = "image"
    width: bool = True
    ffn: int = 3
    text_cka: float = 0.999
    init: Literal["first", "middle"] = "first"
    costs: Costs | None = None
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What a rule chose: edits with their predicted damage, and lines that say why."""

    edits: Sequence[Edit]
    reason: Sequence[str]


Rule = Callable[[Redundancy, Options], Choice]

RULES: dict[str, Rule] = {}
"""Selection rules by name; add one with the decorator `rule`."""


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a selection rule. It gets the analysis and the options, and its edits must meet the budget."""

    def register(function: Rule) -> Rule:
        if name in RULES:
            raise RuntimeError(f"the selection rule {name!r} is registered twice")
        RULES[name] = function
        if name not in RULE_NAMES:
            RULE_NAMES.append(name)
        return function

    return register


def select(
    analysis: Redundancy,
    keep: float | None = None,
    config: RewriteConfig | None = None,
    *,
    costs: Costs | None = None,
    **options: Any,
) -> Plan:
    """Choose edits so that at most `keep` of the teacher's parameters stay, and as few less as the rule can.

    With `latency` the budget is one of time instead, and the predicted damage is the least within it. The plan has its
    exact parameter count, the predicted damage of each edit and the reasons.

    Args:
        analysis: what `analyze` found.
        keep: share of the transformer's parameters that stays, in (0, 1], as in `config`; 0.5 when no budget is given.
        config: the options: the budget, and how it is met. The rules are "paper" (candidates of Algorithm 1 by least
            predicted damage, then the width edits of appendix 6), "budget" (the least predicted damage of all sets of
            edits: `ppcl_fx.passes.selection.frontier`) and "uniform" (evenly spaced blocks: a control).
        costs: with a latency, what each block costs; see `ppcl_fx.schema.costs`.
        **options: fields of `RewriteConfig` by name, over those of `config`.

    Raises:
        PpclError: the budget is no budget or cannot be met, `rule` or `stream` is unknown, or the costs are missing or
            another model's.
    """
    from ppcl_fx.passes.selection import rules  # noqa: F401  (registers the rules)

    config = RewriteConfig.merged(config, options)
    keep = config.keep if keep is None else keep
    rule = config.select or ("paper" if config.latency is None else "budget")
    if rule not in RULES:
        raise PpclError(f"no selection rule {rule!r}{near(rule, RULES)}; the rules are {', '.join(sorted(RULES))}")
    chosen = Options(0, config.stream or analysis.stream, config.width, config.ffn, config.text_cka, config.init)
    if config.latency is None and costs is None:
        chosen = replace(chosen, budget=_budget(analysis, keep, config.params))
    else:
        given = keep is not None or config.params is not None
        chosen = _timed(chosen, rule, config.latency, costs, given=given)
    choice = RULES[rule](analysis, chosen)
    left = analysis.teacher_params - saved(analysis, choice.edits)
    if chosen.costs is None and left > chosen.budget:
        raise RuntimeError(f"the rule {rule!r} kept {left} parameters for a budget of {chosen.budget}")
    share = left / analysis.teacher_params
    most = f"{chosen.budget:,} of {analysis.teacher_params:,} parameters may stay; {left:,} do"
    if chosen.costs is not None:
        most = f"{chosen.milliseconds:.4g} of {chosen.costs.total:.4g} ms may stay; {left:,} parameters do"
    return Plan(
        model=analysis.model,
        teacher_params=analysis.teacher_params,
        params=left,
        edits=list(choice.edits),
        reason=[f"rule {rule}: at most {most} ({share:.2%}), with {len(choice.edits)} edits", *choice.reason],
    )


def _timed(options: Options, rule: str, latency: float | str | None, costs: Costs | None, *, given: bool) -> Options:
    """Return options with a budget of time."""
    if latency is None:
        raise PpclError("costs are given and no latency; give the latency that may stay, or leave the costs out")
    if costs is None:
        raise PpclError(
            f"latency {latency}: needs to know what each block costs; measure it with python -m benchmarks.blocks"
        )
    if given:
        raise PpclError("give either latency or a size (keep, params), not both")
    if rule != "budget":
        raise PpclError(f"the rule {rule!r} knows no time; with latency take the rule 'budget'")
    return replace(options, costs=costs, milliseconds=costs.milliseconds(latency))


def _budget(analysis: Redundancy, keep: float | None, params: int | None) -> int:
    if keep is not None and params is not None:
        raise PpclError("give either keep (a share) or params (a number), not both")
    if params is not None:
        if not 0 < params <= analysis.teacher_params:
            raise PpclError(f"params is {params}; it must lie between 1 and the teacher's {analysis.teacher_params}")
        return params
    share = 0.5 if keep is None else keep
    if not 0.0 < share <= 1.0:
        raise PpclError(f"keep is {share:g}; it is the share of parameters that stays, above 0 and at most 1")
    return int(share * analysis.teacher_params)
