from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    PerUnit,
    StepPolicy,
    StepSignals,
)

Drive = Callable[..., np.ndarray]
FullSteps = Callable[..., list[int]]

SHAPE = (2, 2, 3)  # rows, layers, kv_heads
# A bound is a product and a sum of non-negative float64 numbers, each rounded to the nearest: it may exceed the exact
# one by about 2 x 2**-53 of itself, and with it the count. 1/3 of 3 steps, for one, is 1 in float64 and less exactly.
SLACK = 1 + Fraction(1, 10**12)


class TestByHand:
    @pytest.mark.parametrize(
        ("budget", "burst", "expected"),
        [
            (0.25, 0, [3, 7, 11, 15]),
            (0.25, 1, [0, 3, 7, 11, 15]),
            (0.25, 0.5, [1, 5, 9, 13]),
            (0.5, 0, [1, 3, 5, 7, 9, 11, 13, 15]),
            (1 / 3, 0, [2, 5, 8, 11, 14]),
            (0, 3, [0, 1, 2]),
            (0, 0, []),
            (0.1, 2, [0, 1, 9]),
            (1, 0, list(range(16))),
        ],
    )
    def test_a_unit_that_always_asks_runs_full_as_soon_as_it_can_afford_it(
        self, full_steps: FullSteps, budget: float, burst: float, expected: list[int]
    ) -> None:
        assert full_steps(BudgetConstrained(AlwaysFull(), budget, burst), 16) == expected

    def test_what_a_unit_saves_it_may_spend_later(self, full_steps: FullSteps) -> None:
        turns_away_at_40 = np.where(np.arange(60) < 40, 1.0, 0.0)[:, None]
        policy = BudgetConstrained(CosineThreshold(0.5), 0.1)
        assert full_steps(policy, 60, turns_away_at_40) == [40, 41, 42, 43, 49, 59]

    def test_a_unit_that_does_not_ask_does_not_run_full(self, full_steps: FullSteps) -> None:
        assert full_steps(BudgetConstrained(NeverFull(), 1, burst=5), 10) == []
        assert full_steps(BudgetConstrained(FixedStride(4), 1), 10) == [3, 7]

    def test_only_a_step_that_it_denied_is_noted(self, signals_of: Callable[..., StepSignals]) -> None:
        reasons: dict[str, Any] = {}
        signals = signals_of(
            step=[9, 9, 8, 8], n_full=[0, 0, 0, 0], query_similarity=[0.9, 0.1, 0.9, 0.1], reasons=reasons
        )
        assert BudgetConstrained(CosineThreshold(0.5), 0.1).decide(signals).tolist() == [False, True, False, False]
        assert {reason: units.tolist() for reason, units in reasons.items()} == {"budget": [False, False, False, True]}

    def test_it_denies_also_what_an_age_limit_forces_and_both_are_noted(
        self, signals_of: Callable[..., StepSignals]
    ) -> None:
        reasons: dict[str, Any] = {}
        policy = BudgetConstrained(MaxAge(NeverFull(), 5), 0.1)
        assert not policy.decide(signals_of(step=4, age=5, reasons=reasons)).any()
        assert {reason: units.all() for reason, units in reasons.items()} == {"max_age": True, "budget": True}

    def test_units_have_their_own_budgets_and_bursts(self, drive: Drive) -> None:
        policy = BudgetConstrained(AlwaysFull(), ((0, 0.25), (0.5, 1)), burst=((2, 0), (0, 0)))
        full = drive(policy, 8, zeros=np.zeros((1, 2, 2)))
        assert full.sum(0).tolist() == [[[2, 2], [4, 8]]]
        assert policy.mean_budget == 0.4375
        assert BudgetConstrained(AlwaysFull(), 0.2).mean_budget == 0.2

    @pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
    def test_a_budget_that_is_no_share_is_refused(self, budget: float) -> None:
        with pytest.raises(ValueError, match=r"budget must be between 0 and 1, not "):
            BudgetConstrained(AlwaysFull(), budget)

    def test_a_negative_burst_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"burst must be at least 0, not -1\."):
            BudgetConstrained(AlwaysFull(), 0.1, burst=-1)


def table(values: st.SearchStrategy[float]) -> st.SearchStrategy[PerUnit]:
    rows = st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=2)
    return st.one_of(values, rows)


budgets = table(st.one_of(st.sampled_from([0, 1, 1 / 3, 0.29, 0.07, 0.1, 0.7, 2 / 3, 1e-9]), st.floats(0, 1)))
bursts = table(st.one_of(st.sampled_from([0, 1, 3, 0.1, 1 / 3, 0.93]), st.floats(0, 8)))
inner_policies: st.SearchStrategy[StepPolicy] = st.one_of(
    st.just(AlwaysFull()),
    st.builds(CosineThreshold, st.floats(-1, 1), st.sampled_from([1, 2, 2.5, 5])),
    st.builds(
        LearnedLogistic,
        st.just(("sqrt_age", "query_drift")),
        st.tuples(st.floats(-1, 2), st.floats(-1, 5)),
        st.floats(-4, 2),
    ),
    st.builds(FixedStride, st.floats(1, 12), st.floats(0, 12)),
    st.builds(MaxAge, st.just(CosineThreshold(0.3)), st.integers(1, 9)),
    st.builds(BudgetConstrained, st.just(AlwaysFull()), st.floats(0, 1), st.floats(0, 4)),
)


def exact_bounds(policy: BudgetConstrained, n: int) -> np.ndarray:
    """`budget * n + burst` of every unit as fractions, in `SHAPE`."""
    as_fractions = np.vectorize(Fraction, otypes=[object])
    return np.broadcast_to(as_fractions(policy.budget) * n + as_fractions(policy.burst), SHAPE)


class TestGuarantee:
    @settings(max_examples=60, deadline=None)
    @given(
        inner=inner_policies,
        budget=budgets,
        burst=bursts,
        n_steps=st.integers(1, 60),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_no_unit_exceeds_its_budget_at_any_prefix_nor_do_all_together(
        self, drive: Drive, inner: StepPolicy, budget: PerUnit, burst: PerUnit, n_steps: int, seed: int
    ) -> None:
        policy = BudgetConstrained(inner, budget, burst)
        similarity = np.random.default_rng(seed).uniform(-1, 1, (n_steps, *SHAPE))
        full = drive(policy, n_steps, similarity, np.zeros(SHAPE))
        for n, n_full in enumerate(full.cumsum(0), start=1):
            bounds = exact_bounds(policy, n)
            assert (n_full <= bounds * SLACK).all(), f"after {n} steps: {n_full} full, bounds {bounds.astype(float)}"
            total = Fraction(policy.mean_budget) * n * full[0].size + np.broadcast_to(policy.burst, SHAPE).sum()
            assert n_full.sum() <= total * SLACK
        on_torch = drive(policy, n_steps, torch.tensor(similarity), torch.zeros(SHAPE, dtype=torch.float64))
        np.testing.assert_array_equal(on_torch, full)

    @settings(max_examples=40, deadline=None)
    @given(budget=budgets, burst=bursts, n_steps=st.integers(1, 80))
    def test_a_unit_that_always_asks_gets_all_that_it_may(
        self, drive: Drive, budget: PerUnit, burst: PerUnit, n_steps: int
    ) -> None:
        policy = BudgetConstrained(AlwaysFull(), budget, burst)
        full = drive(policy, n_steps, zeros=np.zeros(SHAPE))
        for n, n_full in enumerate(full.cumsum(0), start=1):
            may = [min(n, math.floor(bound / SLACK)) for bound in exact_bounds(policy, n).ravel()]
            assert (n_full.ravel() >= may).all()
            assert (n_full.ravel() <= n).all()


def test_scaled_budgets_are_shares_still() -> None:
    policy = BudgetConstrained(FixedStride(2), ((0.1, 0.6), (0.2, 1.0)), burst=1)
    assert policy.scaled(2) == BudgetConstrained(FixedStride(2), ((0.2, 1.0), (0.4, 1.0)), burst=1)
    assert BudgetConstrained(FixedStride(2), 0.4).scaled(0.5).budget == 0.2
