"""When to stop drafting: rules that give the most tokens for the time, by rounds whose outcome is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from policies.stops import DraftSignals, FixedDrafts, LearnedDrafts, Outlook, StopRule
from policies.stops.learned_drafts import draft_features
from traces.drafted_rounds import DraftedRounds, RoundCosts

# What a chance is learned from. The number of drafts is not: rounds that a rule ends earlier have other numbers.
_FITTED = ("log_probability", "log_margin", "entropy")
# Limits of the chance that a round's drafts all hold.
_LIMITS = (
    0.02,
    0.05,
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.45,
    0.5,
    0.55,
    0.6,
    0.65,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.95,
)


@dataclass(frozen=True)
class Expected:
    """What a rule comes to on some rounds.

    Attributes:
        tokens_per_round: Tokens whose logits a verification gives, mean: the first, and the drafts that hold.
        drafts_per_round: Drafts, mean.
        tokens_per_ms: Tokens for the time that the rounds take.
    """

    tokens_per_round: float
    drafts_per_round: float
    tokens_per_ms: float


def expected(rule: StopRule, rounds: DraftedRounds, costs: RoundCosts) -> Expected:
    """What a rule would have made of texts whose rounds were drafted to their end.

    A round that the rule ends while all drafts hold lets the next one begin at the token that follows, whose drafts are
    known too; that their sets would then be newer is left out. What is drafted after a wrong draft, until the rule
    notices, is paid for. Where a known round ends, so does the rule's.
    """
    n_rounds, most = rounds.signals.n_drafts.shape
    rows, start, n = np.arange(n_rounds), np.zeros(n_rounds, dtype=np.int64), np.zeros(n_rounds, dtype=np.int64)
    outlook, goes_on = Outlook.before_drafts(n_rounds), np.ones(n_rounds, dtype=bool)
    n_tokens = n_drafts = n_ended = 0
    while goes_on.any():
        # Of rows that have ended the last draft is looked at again, and nothing follows from it.
        at = np.minimum(start + n, most - 1)
        n = n + goes_on
        signals = rounds.signals
        shown = DraftSignals(
            n.astype(np.float64), signals.probability[rows, at], signals.margin[rows, at], signals.entropy[rows, at]
        )
        outlook = outlook.after(rule.acceptance(shown))
        ends = goes_on & (rule.decide(shown, outlook) | (start + n == most))
        n_tokens += int((1 + np.minimum(n, rounds.n_held - start))[ends].sum())
        n_drafts += int(n[ends].sum())
        n_ended += int(ends.sum())
        following = start + n + 1
        goes_on = goes_on & (~ends | ((following <= rounds.n_held) & (following < most)))
        start, n = np.where(ends, following, start), np.where(ends, 0, n)
        outlook = Outlook(*(np.where(ends, 1.0, of_round) for of_round in outlook))
    drafts_per_round = n_drafts / n_ended
    return Expected(n_tokens / n_ended, drafts_per_round, n_tokens / (n_ended * costs.round_ms(drafts_per_round)))


def fixed_rules(most: int) -> list[FixedDrafts]:
    """Every length."""
    return [FixedDrafts(n) for n in range(1, most + 1)]


def learned_rules(rounds: DraftedRounds) -> list[LearnedDrafts]:
    """One logistic, fitted to the drafts before and at each round's first wrong one, with every limit.

    Empty if all drafts hold, or none: there is nothing to tell apart.
    """
    most = rounds.most_drafts
    asked = np.arange(most) <= rounds.n_held[:, None]
    holds = (np.arange(most) < rounds.n_held[:, None])[asked]
    if holds.all() or not holds.any():
        return []
    shown = DraftSignals(*(getattr(rounds.signals, field.name)[asked] for field in dataclasses.fields(DraftSignals)))
    columns = np.stack(draft_features(shown, _FITTED), axis=1)
    mean, scale = columns.mean(0), columns.std(0) + 1e-9
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit((columns - mean) / scale, holds)
    weights = fitted.coef_[0] / scale
    bias = float(fitted.intercept_[0] - weights @ mean)
    numbers = tuple(float(weight) for weight in weights)
    return [LearnedDrafts(_FITTED, numbers, bias, limit, most) for limit in _LIMITS]


def best_rule(rules: Sequence[StopRule], rounds: DraftedRounds, costs: RoundCosts) -> tuple[StopRule, Expected]:
    """The rule with the most tokens for the time; of equals the first."""
    found = [(rule, expected(rule, rounds, costs)) for rule in rules]
    return max(found, key=lambda one: one[1].tokens_per_ms)
