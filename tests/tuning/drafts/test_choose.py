"""Rules are chosen for the most tokens for the time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.stops import ConfidentDrafts, DraftSignals, FixedDrafts, LearnedDrafts, StopRule
from traces.drafted_rounds import DraftedRounds, RoundCosts
from tuning.drafts.choose import best_rule, expected, fixed_rules, learned_rules

COSTS = RoundCosts(5.0, 10.0, 0.2, 12.0)


def rounds_of(n_rounds: int = 400, most: int = 12, seed: int = 0, tells: bool = True) -> DraftedRounds:
    """Drafts that hold by a chance which their margin tells, or does not."""
    drawn = np.random.default_rng(seed)
    margin = drawn.exponential(2.0, (n_rounds, most))
    chance = 1 / (1 + np.exp(-(1.5 * np.log(margin) + 3))) if tells else np.full(margin.shape, 0.85)
    n_held = (drawn.random(margin.shape) < chance).cumprod(1).sum(1)
    n_drafts = np.tile(np.arange(1.0, most + 1), (n_rounds, 1))
    signals = DraftSignals(n_drafts, np.full(margin.shape, 0.5), margin, np.full(margin.shape, 1.0))
    return DraftedRounds(signals, n_held, np.zeros(n_rounds, dtype=np.int64))


def test_a_fixed_rule_comes_to_what_its_length_says() -> None:
    # Of twelve drafts five hold: rounds of two begin at the tokens 0 and 3, and the token 6 is another than drafted.
    rounds = rounds_of(1)
    rounds = DraftedRounds(rounds.signals, np.array([5]), rounds.text)
    found = expected(FixedDrafts(2), rounds, COSTS)
    assert (found.drafts_per_round, found.tokens_per_round) == (2, 3)
    assert found.tokens_per_ms == pytest.approx(6 / (4 * 5 + 2 * 10 + 6 * 0.2))
    # A round of four holds, and of that which begins at token 5 nothing more does.
    assert expected(FixedDrafts(4), rounds, COSTS).tokens_per_round == (5 + 1) / 2
    assert expected(FixedDrafts(12), rounds, COSTS).tokens_per_round == 6


def test_rounds_of_drafts_that_all_hold_are_whole() -> None:
    rounds = rounds_of(3)
    whole = DraftedRounds(rounds.signals, np.full(3, 12), rounds.text)
    assert expected(FixedDrafts(5), whole, COSTS).tokens_per_round == 6
    assert expected(ConfidentDrafts(0.0, 12), whole, COSTS).drafts_per_round == 12


@given(
    st.sampled_from([FixedDrafts(1), FixedDrafts(40), ConfidentDrafts(0.3, 7), ConfidentDrafts(0.0, 99)]),
    st.integers(0, 9),
)
def test_a_round_has_from_one_to_all_of_its_drafts_and_no_more_tokens_than_them(rule: StopRule, seed: int) -> None:
    found = expected(rule, rounds_of(20, seed=seed), COSTS)
    assert 1 <= found.drafts_per_round <= min(12, rule.most_drafts)
    assert 1 <= found.tokens_per_round <= found.drafts_per_round + 1


def test_the_best_length_grows_with_what_a_verification_costs() -> None:
    rounds = rounds_of(tells=False)
    lengths = [
        best_rule(fixed_rules(12), rounds, RoundCosts(5.0, verify_ms, 0.2, 12.0))[0].most_drafts
        for verify_ms in (1, 10, 80)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_a_learned_rule_beats_every_length_where_drafts_tell_whether_they_hold() -> None:
    tune, held_out = rounds_of(), rounds_of(seed=1)
    learned, _ = best_rule(learned_rules(tune), tune, COSTS)
    assert isinstance(learned, LearnedDrafts)
    lengths = [expected(rule, held_out, COSTS).tokens_per_ms for rule in fixed_rules(12)]
    assert expected(learned, held_out, COSTS).tokens_per_ms > 1.05 * max(lengths)
    # The margin is what tells.
    assert abs(learned.weights[learned.features.index("log_margin")] - 1.5) < 0.4


def test_a_learned_rule_costs_nothing_where_they_do_not() -> None:
    tune, held_out = rounds_of(tells=False), rounds_of(seed=1, tells=False)
    chosen, _ = best_rule([*fixed_rules(12), *learned_rules(tune)], tune, COSTS)
    best = max(expected(rule, held_out, COSTS).tokens_per_ms for rule in fixed_rules(12))
    assert expected(chosen, held_out, COSTS).tokens_per_ms > 0.95 * best


def test_where_all_drafts_hold_there_is_nothing_to_learn() -> None:
    rounds = rounds_of()
    whole = DraftedRounds(rounds.signals, np.full_like(rounds.n_held, 12), rounds.text)
    assert learned_rules(whole) == []
