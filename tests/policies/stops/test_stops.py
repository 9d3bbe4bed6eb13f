"""Every rule ends a round, in time, and refuses numbers that none can have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.stops import ConfidentDrafts, DraftSignals, FixedDrafts, StopRule
from policies.stops.base import MOST_DRAFTS

RULES: tuple[StopRule, ...] = (FixedDrafts(1), FixedDrafts(6), ConfidentDrafts(), ConfidentDrafts(0.0, 9))


def signals(n_drafts: int, probability: float = 0.9, n_rows: int = 2) -> DraftSignals:
    return DraftSignals(*(np.full(n_rows, value) for value in (float(n_drafts), probability, 1.0, 0.5)))


def n_drafted(rule: StopRule, probabilities: list[float]) -> int:
    survival = np.ones(1)
    for n, probability in enumerate(probabilities, 1):
        seen = signals(n, probability, 1)
        survival = survival * rule.acceptance(seen)
        if rule.decide(seen, survival)[0]:
            return n
    raise AssertionError("it never stops")


def test_every_kind_has_an_example() -> None:
    assert {type(rule) for rule in RULES} == set(StopRule.__subclasses__())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_round_ends_by_its_most_drafts(rule: StopRule) -> None:
    assert n_drafted(rule, [1.0] * MOST_DRAFTS) == rule.most_drafts


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_of_nan_stops_where_distributions_are_read_and_is_like_any_other_where_not(rule: StopRule) -> None:
    stops = rule.decide(signals(1, np.nan), np.full(2, np.nan))
    assert stops.dtype == bool
    others = rule.decide(signals(1), np.ones(2))
    assert stops.all() if rule.reads_distributions else (stops == others).all()


@given(st.lists(st.floats(0, 1), min_size=20, max_size=20), st.floats(0, 1))
def test_confident_rounds_end_where_the_product_falls_below_the_limit(chances: list[float], least: float) -> None:
    below = np.flatnonzero(np.cumprod(chances) < least)
    expected = min(int(below[0]) + 1 if below.size else 20, 16)
    assert n_drafted(ConfidentDrafts(least, 16), chances) == expected


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
    ],
)
def test_numbers_that_no_round_can_have_are_refused(make: Callable[[], StopRule], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make()
