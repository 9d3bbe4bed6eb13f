from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import (
    AlwaysFull,
    BudgetConstrained,
    FixedStride,
    MaxAge,
    NeverFull,
    RefreshKeys,
    StepSignals,
    policy_from_json,
    policy_program,
    policy_to_json,
)

SOME = ((1.0, 0.0), (0.0, 0.0))
# At most so many full steps per step; each unit of `SOME` that is in the mode counts half.
BUDGET = ((0.4, 0.3), (0.2, 0.1))

modes = st.one_of(
    st.integers(0, 1), st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=3)
)


def test_all_units_are_in_the_mode_unless_a_table_says_which() -> None:
    assert RefreshKeys(AlwaysFull()).keys_only == 1
    assert RefreshKeys(AlwaysFull()).full_cost == 0.5
    assert RefreshKeys(AlwaysFull(), SOME).keys_only == SOME
    assert RefreshKeys(AlwaysFull(), SOME).full_cost == ((0.5, 1), (1, 1))
    assert RefreshKeys(AlwaysFull(), np.array(SOME) == 1).keys_only == SOME
    assert AlwaysFull().full_cost == 1


def test_the_outermost_has_the_last_word() -> None:
    assert RefreshKeys(RefreshKeys(AlwaysFull(), 1), SOME).keys_only == SOME
    assert RefreshKeys(MaxAge(RefreshKeys(AlwaysFull(), SOME), 4), 0).keys_only == 0


@given(units=modes)
def test_it_comes_back_from_json(units: Any) -> None:
    policy = RefreshKeys(MaxAge(NeverFull(), 3), units)
    assert policy_from_json(policy_to_json(policy)) == policy
    assert policy_from_json(policy_to_json(policy)).keys_only == policy.keys_only


def test_units_are_all_of_them_where_json_does_not_name_them() -> None:
    assert policy_from_json({"kind": "refresh_keys", "policy": {"kind": "always_full"}}) == RefreshKeys(AlwaysFull())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (0.5, r"units must be 0 or 1, not 0\.5\."),
        (2, r"units must be between 0 and 1, not 2\."),
        (-1, r"units must be between 0 and 1, not -1\."),
        (float("nan"), r"units must be between 0 and 1, not nan\."),
        (((1, 0), (0.25, 1)), r"units must be 0 or 1, not 0\.25\."),
        ((1, 0), r"units must be one number, or a table .*, not \(1, 0\)\."),
        ("all", r"units must be one number, or a table .*, not 'all'\."),
        (True, r"units must be one number, or a table .*, not True\."),
    ],
)
def test_anything_but_0_and_1_is_refused(units: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RefreshKeys(AlwaysFull(), units)


def test_its_program_is_that_of_the_inner_policy() -> None:
    inner = BudgetConstrained(FixedStride(2.5), 0.3)
    alone, wrapped = policy_program(inner), policy_program(RefreshKeys(inner, SOME))
    np.testing.assert_array_equal(wrapped.instructions, alone.instructions)
    assert (wrapped.full, wrapped.reasons) == (alone.full, alone.reasons)


class TestWithABudget:
    def test_a_budget_inside_or_outside_grants_the_same(self, drive: Callable[..., np.ndarray]) -> None:
        zeros = np.zeros((3, 2, 2))
        inside = drive(BudgetConstrained(RefreshKeys(AlwaysFull(), SOME), BUDGET, 1), 30, zeros=zeros)
        outside = drive(RefreshKeys(BudgetConstrained(AlwaysFull(), BUDGET, 1), SOME), 30, zeros=zeros)
        alone = drive(BudgetConstrained(AlwaysFull(), BUDGET, 1), 30, zeros=zeros)
        np.testing.assert_array_equal(inside, alone)
        np.testing.assert_array_equal(outside, alone)

    def test_its_reasons_reach_through(self, signals_of: Callable[..., StepSignals]) -> None:
        reasons: dict[str, Any] = {}
        RefreshKeys(BudgetConstrained(AlwaysFull(), 0.1)).decide(signals_of(reasons=reasons))
        assert reasons["budget"].all()

    def test_a_budget_around_the_mode_knows_that_refreshes_cost_half(self) -> None:
        assert BudgetConstrained(RefreshKeys(AlwaysFull()), 0.2).mean_budget == pytest.approx(0.1)
        assert BudgetConstrained(RefreshKeys(AlwaysFull(), SOME), 0.2).mean_budget == pytest.approx(0.2 * 3.5 / 4)
        assert BudgetConstrained(RefreshKeys(AlwaysFull()), BUDGET).mean_budget == pytest.approx(0.125)
        policy = BudgetConstrained(MaxAge(RefreshKeys(AlwaysFull(), SOME), 9), BUDGET)
        assert policy.mean_budget == pytest.approx((0.2 + 0.3 + 0.2 + 0.1) / 4)

    def test_a_budget_inside_the_mode_takes_refreshes_for_full_steps(self) -> None:
        policy = RefreshKeys(BudgetConstrained(AlwaysFull(), 0.2)).policy
        assert isinstance(policy, BudgetConstrained)
        assert policy.mean_budget == 0.2

    def test_the_mean_budget_bounds_the_full_share_at_every_prefix(self, drive: Callable[..., np.ndarray]) -> None:
        policy = BudgetConstrained(RefreshKeys(AlwaysFull(), SOME), BUDGET)
        counted = drive(policy, 40, zeros=np.zeros((1, 2, 2))) * np.array(policy.full_cost)
        shares = counted.mean((1, 2, 3)).cumsum() / np.arange(1, 41)
        assert (shares <= policy.mean_budget * (1 + 1e-12)).all()
        assert shares[39] == pytest.approx(policy.mean_budget)
