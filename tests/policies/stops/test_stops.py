"""Every rule ends a round, in time, and refuses numbers that none can have."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import ModelShape, NeverFull, PolicyFile, Selection
from policies.serialize import stop_from_json, stop_to_json
from policies.stops import (
    BudgetedDrafts,
    ConfidentDrafts,
    DraftSignals,
    FixedDrafts,
    LearnedDrafts,
    Outlook,
    StopRule,
    registry,
)
from policies.stops.base import MOST_DRAFTS
from policies.stops.learned_drafts import FEATURES

LEARNED = LearnedDrafts(FEATURES, (-0.1, 0.4, 1.2, -0.3), 2.5, 0.4, 12)
RULES: tuple[StopRule, ...] = (
    FixedDrafts(1),
    FixedDrafts(6),
    ConfidentDrafts(),
    ConfidentDrafts(0.0, 9),
    LEARNED,
    LearnedDrafts((), (), 50.0, 0.5, 256),
    BudgetedDrafts(0.1, 9),
)


def signals(n_drafts: int, probability: float = 0.9, n_rows: int = 2) -> DraftSignals:
    return DraftSignals(*(np.full(n_rows, value) for value in (float(n_drafts), probability, 1.0, 0.5)))


def n_drafted(rule: StopRule, probabilities: list[float]) -> int:
    outlook = Outlook.before_drafts(1)
    for n, probability in enumerate(probabilities, 1):
        seen = signals(n, probability, 1)
        outlook = outlook.after(rule.acceptance(seen))
        if rule.decide(seen, outlook)[0]:
            return n
    raise AssertionError("it never stops")


def test_every_kind_has_an_example() -> None:
    assert {type(rule) for rule in RULES} == set(StopRule.__subclasses__()) == set(registry.RULES.built_in)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_round_ends_by_its_most_drafts(rule: StopRule) -> None:
    n_drafts = n_drafted(rule, [1.0] * MOST_DRAFTS)
    assert n_drafts == rule.most_drafts if rule is not LEARNED else 1 <= n_drafts <= rule.most_drafts


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_policy_file_has_the_rule_that_was_written(rule: StopRule) -> None:
    shape = ModelShape("m", 1, 1, 1, 8)
    file = PolicyFile(NeverFull(), Selection(40), shape, stop=rule)
    values = json.loads(json.dumps(file.to_json()))
    assert PolicyFile.from_json(values).stop == rule == stop_from_json(json.loads(json.dumps(stop_to_json(rule))))
    assert "stop" not in PolicyFile(NeverFull(), Selection(40), shape).to_json()


@pytest.mark.parametrize(
    ("stop", "problem"),
    [
        (
            {"kind": "asks_a_friend"},
            "unknown stop rule kind 'asks_a_friend': known are budgeted_drafts, confident_drafts",
        ),
        ({"kind": "fixed_drafts", "n_drafts": 0}, "from 1 to 256 tokens, not 0"),
        ({"kind": "fixed_drafts"}, "n_drafts"),
        ({"n_drafts": 3}, "stop"),
        ([], "stop"),
    ],
)
def test_a_policy_file_with_no_rule_in_the_place_of_one_is_refused(stop: object, problem: str) -> None:
    values = PolicyFile(NeverFull(), Selection(40), ModelShape("m", 1, 1, 1, 8)).to_json() | {"stop": stop}
    with pytest.raises(ValueError, match=problem):
        PolicyFile.from_json(values)


@given(st.floats(0, 1), st.floats(0, 30), st.floats(0, 12), st.integers(1, 256))
def test_a_learned_chance_is_one(probability: float, margin: float, entropy: float, n_drafts: int) -> None:
    shown = DraftSignals(*(np.array([float(number)]) for number in (n_drafts, probability, margin, entropy)))
    (chance,) = LEARNED.acceptance(shown)
    assert 0 <= chance <= 1
    # A surer draft of the same place is no less likely to hold.
    (surer,) = LEARNED.acceptance(DraftSignals(shown.n_drafts, shown.probability, shown.margin + 1, shown.entropy))
    assert surer >= chance


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_of_nan_stops_where_distributions_are_read_and_is_like_any_other_where_not(rule: StopRule) -> None:
    begun = Outlook.before_drafts(2)
    stops = rule.decide(signals(1, np.nan), begun.after(np.full(2, np.nan)))
    assert stops.dtype == bool
    others = rule.decide(signals(1), begun.after(np.ones(2)))
    assert stops.all() if rule.reads_distributions else (stops == others).all()


@given(st.lists(st.floats(0, 1), min_size=20, max_size=20), st.floats(0, 1))
def test_confident_rounds_end_where_the_product_falls_below_the_limit(chances: list[float], least: float) -> None:
    below = np.flatnonzero(np.cumprod(chances) < least)
    expected = min(int(below[0]) + 1 if below.size else 20, 16)
    assert n_drafted(ConfidentDrafts(least, 16), chances) == expected


@given(st.lists(st.floats(0, 1), min_size=40, max_size=40), st.floats(0.03, 1))
def test_budgeted_rounds_end_where_as_many_tokens_are_expected_as_the_budget_asks_for(
    chances: list[float], budget: float
) -> None:
    enough = np.flatnonzero(~((1 + np.cumsum(np.cumprod(chances))) * budget < 1))
    expected = int(enough[0]) + 1 if enough.size else 40
    assert n_drafted(BudgetedDrafts(budget, 40), chances) == expected


@pytest.mark.parametrize(("budget", "n_drafts"), [(1.0, 1), (0.5, 1), (0.25, 3), (0.11, 9), (0.1, 9)])
def test_sure_drafts_are_as_many_as_the_budget_allows_for(budget: float, n_drafts: int) -> None:
    assert n_drafted(BudgetedDrafts(budget), [1.0] * MOST_DRAFTS) == n_drafts


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: FixedDrafts(0), "from 1 to 256 tokens, not 0"),
        (lambda: FixedDrafts(257), "not 257"),
        (lambda: FixedDrafts(True), "not True"),
        (lambda: FixedDrafts(2.5), "not 2.5"),  # type: ignore[arg-type]
        (lambda: ConfidentDrafts(1.1), "probability in .0, 1., not 1.1"),
        (lambda: ConfidentDrafts(float("nan")), "not nan"),
        (lambda: ConfidentDrafts(0.5, 0), "not 0"),
        (lambda: BudgetedDrafts(0.0), "a budget is verifications for a token, in .0, 1., not 0"),
        (lambda: BudgetedDrafts(float("nan")), "not nan"),
        (lambda: BudgetedDrafts(0.1, 8), "at most 8 drafts give 9 tokens, and a budget of 0.1 asks for 10"),
        (lambda: LearnedDrafts(("mood",), (1.0,), 0.0, 0.5, 4), "unknown feature 'mood'"),
        (lambda: LearnedDrafts(("entropy", "entropy"), (1.0, 1.0), 0.0, 0.5, 4), "must differ"),
        (lambda: LearnedDrafts(("entropy",), (), 0.0, 0.5, 4), "1 features of drafts have 0 weights"),
        (lambda: LearnedDrafts((), (), float("inf"), 0.5, 4), "must be finite, not inf"),
        (lambda: LearnedDrafts((), (), 0.0, 1.5, 4), "not 1.5"),
    ],
)
def test_numbers_that_no_round_can_have_are_refused(make: Callable[[], StopRule], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make()
