"""Which policies are measured side by side on the held-out prompts, and what becomes of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from policies import FixedStride, StepPolicy
from tuning.certify.certificate import KlLimit
from tuning.certify.ladder import Ladder, fixed_sequence
from tuning.confirm.results import FamilyResult, Measured
from tuning.confirm.winners import Winner
from tuning.divide.tuning_data import TuningData
from tuning.families.other_budgets import at_budget, budget_label, references, stride_label

Measure = Callable[[Mapping[str, StepPolicy]], Mapping[str, Measured]]
"""Measures policies by label, all in the same closed-loop runs on the held-out prompts."""


@dataclass(frozen=True)
class Compared:
    """Policies on the held-out prompts, by the part that they play in a `TuningResult`.

    Attributes:
        budget: Of the policy that is exported.
        families: Winners, the exported one first.
        baseline: Fixed stride of 1 / budget.
        references: Other policies at other budgets.
        ladder: How the budget was chosen; None where it was given.
    """

    budget: float
    families: Sequence[FamilyResult]
    baseline: Measured
    references: Sequence[Measured]
    ladder: Ladder | None = None


def compare_winners(measure: Measure, data: TuningData, winners: Sequence[Winner]) -> Compared:
    """Measure the winners of all families at the budget they were searched at, beside the baseline and references."""
    best = _best(winners)
    others = references(best.search.family, best.candidate.parameters, data)
    baseline = stride_label(data.budget)
    found = measure(
        {winner.search.family: winner.candidate.policy for winner in winners}
        | {baseline: FixedStride(1 / data.budget)}
        | others
    )
    families = [
        FamilyResult(
            family=winner.search.family,
            parameters=winner.candidate.parameters,
            measured=found[winner.search.family],
            tune_kl=winner.tune_kl,
            trials=winner.search.trials,
        )
        for winner in sorted(winners, key=lambda winner: winner.tune_kl)
    ]
    return Compared(data.budget, families, found[baseline], [found[label] for label in others])


def compare_ladder(
    measure: Measure,
    data: TuningData,
    winners: Sequence[Winner],
    asked: KlLimit,
    budgets: Sequence[float],
    n_kinds: int,
) -> Compared:
    """Measure the best family at every budget, each beside a fixed stride, and choose the cheapest that is certified.

    The other families are not measured: which of them is how good at one budget is what `compare_winners` is for.

    Args:
        measure: Measures policies on the held-out prompts.
        data: What the families were searched on.
        winners: One per family.
        asked: What is to be certified.
        budgets: To try, falling.
        n_kinds: Kinds of text among the prompts.

    Raises:
        ValueError: If no policy is certified.
    """
    best = _best(winners)
    family, parameters = best.search.family, best.candidate.parameters
    labels = {budget: budget_label(family, budget) for budget in budgets}
    strides = {budget: stride_label(budget) for budget in budgets}
    found = measure(
        {labels[budget]: at_budget(family, parameters, data, budget) for budget in budgets}
        | {strides[budget]: FixedStride(1 / budget) for budget in budgets}
    )
    kl = [found[label].prompt_kl for label in labels.values()]
    ladder = fixed_sequence(asked, budgets, list(labels.values()), kl)
    if ladder.chosen is None:
        raise ValueError(ladder.refusal(n_kinds))
    chosen = ladder.chosen.budget
    exported = FamilyResult(
        family=family,
        parameters=parameters,
        measured=found[labels[chosen]],
        tune_kl=best.tune_kl if chosen == data.budget else None,
        trials=best.search.trials,
    )
    others = [found[of[budget]] for budget in budgets for of in (labels, strides) if budget != chosen]
    return Compared(chosen, [exported], found[strides[chosen]], others, ladder)


def _best(winners: Sequence[Winner]) -> Winner:
    return min(winners, key=lambda winner: winner.tune_kl)
