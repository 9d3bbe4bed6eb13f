"""When to stop drafting: rules that give the most tokens for the time, by rounds whose outcome is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from policies.stops import DraftSignals, FixedDrafts, LearnedDrafts, StopRule
from policies.stops.learned_drafts import FEATURES, draft_features
from traces.drafted_rounds import DraftedRounds, RoundCosts

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


def n_drafted(rule: StopRule, rounds: DraftedRounds) -> np.ndarray:
    """Drafts after which a rule ends each round, int64 `(rounds,)`; those of rounds that it would go on with, all."""
    n_rounds, most = rounds.signals.n_drafts.shape
    ended = np.full(n_rounds, most)
    goes_on, survival = np.ones(n_rounds, dtype=bool), np.ones(n_rounds)
    for j in range(most):
        shown = DraftSignals(*(getattr(rounds.signals, field.name)[:, j] for field in dataclasses.fields(DraftSignals)))
        survival = survival * rule.acceptance(shown)
        stops = goes_on & rule.decide(shown, survival)
        ended[stops] = j + 1
        goes_on &= ~stops
    return ended


def expected(rule: StopRule, rounds: DraftedRounds, costs: RoundCosts) -> Expected:
    """What a rule would have made of rounds that were drafted to their end.

    A round that ends earlier lets the next one begin elsewhere; how often drafts hold is taken to be the same there.
    """
    drafts = n_drafted(rule, rounds)
    tokens = 1 + np.minimum(drafts, rounds.n_held)
    return Expected(tokens.mean(), drafts.mean(), float(tokens.sum() / costs.round_ms(drafts).sum()))


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
    columns = np.stack(draft_features(shown, FEATURES), axis=1)
    mean, scale = columns.mean(0), columns.std(0) + 1e-9
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit((columns - mean) / scale, holds)
    weights = fitted.coef_[0] / scale
    bias = float(fitted.intercept_[0] - weights @ mean)
    numbers = tuple(float(weight) for weight in weights)
    return [LearnedDrafts(FEATURES, numbers, bias, limit, most) for limit in _LIMITS]


def best_rule(rules: Sequence[StopRule], rounds: DraftedRounds, costs: RoundCosts) -> tuple[StopRule, Expected]:
    """The rule with the most tokens for the time; of equals the first."""
    found = [(rule, expected(rule, rounds, costs)) for rule in rules]
    return max(found, key=lambda one: one[1].tokens_per_ms)
