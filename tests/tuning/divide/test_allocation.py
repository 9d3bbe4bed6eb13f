from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from tuning.divide.allocation import STRIDES, allocate, loss_by_stride, who_refreshes_by_keys

RATES = 1 / STRIDES
FEW = np.array([1, 2, 3, 5, 8])


def simulated_loss(by_age: np.ndarray, since_prompt: np.ndarray, stride: int) -> float:
    age, refreshed, total = 0, False, 0.0
    for step, of_prompt in enumerate(since_prompt):
        age += 1
        if step % stride == stride - 1:
            age, refreshed = 0, True
        elif refreshed:
            total += by_age[min(age, len(by_age)) - 1]
        else:
            total += of_prompt
    return total / len(since_prompt)


@pytest.mark.parametrize("max_age", [1, 4, 9, 300])
@pytest.mark.parametrize("n_steps", [1, 7, 130])
def test_loss_by_stride_is_what_a_clock_of_that_stride_loses_over_the_output(max_age: int, n_steps: int) -> None:
    rng = np.random.default_rng(max_age)
    by_age, since_prompt = rng.random(max_age), rng.random(n_steps)
    found = loss_by_stride(by_age, since_prompt)
    np.testing.assert_allclose(found, [simulated_loss(by_age, since_prompt, int(stride)) for stride in STRIDES])


def test_a_clock_that_never_strikes_pays_for_the_prompts_set_at_the_end_of_the_output() -> None:
    since_prompt = np.linspace(0.1, 0.9, 50)
    assert loss_by_stride(np.zeros(50), since_prompt)[-1] == pytest.approx(since_prompt.mean())


def test_loss_by_stride_treats_units_alone() -> None:
    by_age, since_prompt = np.random.default_rng(0).random((2, 5, 2, 3))
    found = loss_by_stride(by_age, since_prompt, FEW)
    assert found.shape == (5, 2, 3)
    for unit in np.ndindex(2, 3):
        alone = loss_by_stride(by_age[(..., *unit)], since_prompt[(..., *unit)], FEW)
        np.testing.assert_allclose(found[(..., *unit)], alone)


def test_refreshing_at_every_step_loses_nothing() -> None:
    always = np.full((4, 2), 0.7)
    assert (loss_by_stride(always, always, np.array([1])) == 0).all()


def by_stride(by_age: np.ndarray) -> np.ndarray:
    """Losses over 10,000 steps; the prompt's set is like any other, and older sets lose what the oldest loses."""
    rest = np.broadcast_to(by_age[-1], (10_000 - len(by_age), *by_age.shape[1:]))
    return loss_by_stride(by_age, np.concatenate([by_age, rest]))


def losses(n_units: int, seed: int, strides: np.ndarray = FEW) -> np.ndarray:
    """Curves of many forms: convex and not, flat in parts, and worse where refreshed more."""
    rng = np.random.default_rng(seed)
    curves = rng.random((len(strides), n_units))
    curves = np.where(rng.random(n_units) < 0.5, np.sort(curves, axis=0), curves)
    return np.where(rng.random(curves.shape) < 0.1, 0.5, curves) * rng.choice([0.01, 1, 100], n_units)


def interpolated(loss: np.ndarray, rates: np.ndarray, strides: np.ndarray) -> float:
    """Least total loss of mixtures of strides that have the given rates, one unit at a time."""
    total = 0.0
    for unit, rate in enumerate(rates):
        equalities = np.stack([np.ones(len(strides)), 1 / strides])
        total += linprog(loss[:, unit], A_eq=equalities, b_eq=[1, rate], bounds=(0, 1)).fun
    return total


instances = given(n_units=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), budget=st.floats(1 / 8, 1))
some = settings(max_examples=40, deadline=None)


@instances
@some
def test_no_mixture_of_strides_within_the_budget_loses_less(n_units: int, seed: int, budget: float) -> None:
    loss = losses(n_units, seed)
    # One variable per unit and stride: how much of the time the unit is on it.
    use = [np.tile(1 / FEW, n_units)]
    each_unit_always_on_one = np.repeat(np.eye(n_units), len(FEW), axis=1)
    best = linprog(
        loss.T.ravel(), A_ub=use, b_ub=[budget * n_units], A_eq=each_unit_always_on_one, b_eq=np.ones(n_units)
    )
    rates = allocate(loss, budget, FEW)
    assert interpolated(loss, rates, FEW) == pytest.approx(best.fun, rel=1e-6, abs=1e-8)


@instances
@some
def test_the_budget_is_respected_and_every_rate_is_one_that_a_unit_can_have(
    n_units: int, seed: int, budget: float
) -> None:
    rates = allocate(losses(n_units, seed), budget, FEW)
    assert rates.shape == (n_units,)
    assert rates.mean() <= budget + 1e-12
    assert ((rates >= 1 / 8 - 1e-12) & (rates <= 1 + 1e-12)).all()


@given(seed=st.integers(0, 2**32 - 1), budgets=st.tuples(st.floats(1 / 8, 1), st.floats(1 / 8, 1)))
@some
def test_a_larger_budget_takes_nothing_from_any_unit(seed: int, budgets: tuple[float, float]) -> None:
    loss = losses(4, seed)
    less, more = (allocate(loss, budget, FEW) for budget in sorted(budgets))
    assert (more >= less - 1e-12).all()


@given(seed=st.integers(0, 2**32 - 1), budget=st.floats(1 / 8, 1))
@some
def test_equal_units_get_equal_rates(seed: int, budget: float) -> None:
    curve = np.sort(np.random.default_rng(seed).random(len(FEW)))
    assume(len(set(curve)) == len(FEW))
    rates = allocate(np.tile(curve[:, None], 6), budget, FEW)
    np.testing.assert_allclose(rates, rates[0])
    # Every refresh lowers the loss: all of the budget is worth spending.
    np.testing.assert_allclose(rates, budget)


def test_a_budget_of_one_gives_everything_to_everyone() -> None:
    loss = by_stride(np.cumsum(np.random.default_rng(0).random((40, 7)), axis=0))
    np.testing.assert_allclose(allocate(loss, 1.0), 1)


def test_a_unit_that_loses_more_is_refreshed_more() -> None:
    by_age = np.linspace(0.1, 0.5, 64)[:, None] * [1, 4, 16]
    rates = allocate(by_stride(by_age), 0.2)
    assert rates[0] < rates[1] < rates[2]
    assert rates.mean() == pytest.approx(0.2)


def test_nothing_is_spent_on_a_unit_that_gains_nothing() -> None:
    loss = by_stride(np.stack([np.zeros(8), np.linspace(0.1, 0.8, 8)], axis=1))
    rates = allocate(loss, 0.4)
    assert rates[0] == pytest.approx(RATES[-1])
    assert rates[1] == pytest.approx(0.8 - RATES[-1])
    assert allocate(loss, 1.0) == pytest.approx([RATES[-1], 1])


def test_points_above_the_convex_hull_are_no_place_to_stop() -> None:
    # At rates 1, 1/2 and 1/4. The first unit gains 1.8 per rate from 1/2 on but only 0.4 before: 4/3 on the whole. The
    # second gains 1.6, then 0.8.
    loss = np.array([[0.0, 0.0], [0.9, 0.4], [1.0, 0.8]])
    strides = np.array([1, 2, 4])
    np.testing.assert_allclose(allocate(loss, 0.3125, strides), [0.25, 0.375])
    np.testing.assert_allclose(allocate(loss, 0.5, strides), [0.5, 0.5])
    np.testing.assert_allclose(allocate(loss, 0.75, strides), [1, 0.5])
    np.testing.assert_allclose(allocate(loss, 1.0, strides), [1, 1])


def test_the_steepest_gain_is_bought_first() -> None:
    strides = np.array([1, 2, 4])
    loss = np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 9.0]])
    # Gains per rate: unit 0 4 then 2; unit 1 24 then 6.
    np.testing.assert_allclose(allocate(loss, 0.375, strides), [0.25, 0.5])
    np.testing.assert_allclose(allocate(loss, 0.5, strides), [0.25, 0.75])
    np.testing.assert_allclose(allocate(loss, 0.6875, strides), [0.375, 1])


@pytest.mark.parametrize("budget", [1 / (STRIDES[-1] + 1), 1e-6, 0.0])
def test_a_budget_below_the_longest_stride_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=f"below one full step in {STRIDES[-1]}, the longest stride"):
        allocate(by_stride(np.ones((3, 2))), budget)


def test_a_budget_of_just_the_longest_stride_is_enough() -> None:
    np.testing.assert_allclose(allocate(by_stride(np.ones((3, 2))), RATES[-1]), RATES[-1])


def test_a_step_at_half_the_cost_is_bought_twice() -> None:
    # Two equal units, of which one pays half: it is served first, and the other gets what is left.
    loss = by_stride(np.broadcast_to([[0.5], [0.6], [0.7]], (3, 2)))
    rates = allocate(loss, 0.5, full_cost=np.array([0.5, 1.0]))
    assert rates[0] == 1.0
    assert (rates * [0.5, 1.0]).mean() == pytest.approx(0.5)


@given(seed=st.integers(0, 10**6), budget=st.floats(0.001, 1))
@settings(deadline=None, max_examples=40)
def test_a_budget_of_costs_is_respected(seed: int, budget: float) -> None:
    rng = np.random.default_rng(seed)
    loss = by_stride(np.sort(rng.random((6, 5)), axis=0))
    cost = rng.choice([0.5, 1.0], 5)
    rates = allocate(loss, budget, full_cost=cost)
    assert (rates * cost).mean() <= budget * (1 + 1e-12)


def test_units_refresh_by_keys_alone_where_the_new_set_is_good_and_half_the_cost_counts() -> None:
    # Attention moves at every step in all three; the new set misses nothing, half of it, all of it.
    loss = by_stride(np.full((4, 3), 0.8))
    by_keys = who_refreshes_by_keys(loss, np.array([0.0, 0.4, 0.8]), 0.3)
    assert by_keys.tolist()[0] is True
    assert by_keys.tolist()[2] is False


def test_nobody_refreshes_by_keys_alone_where_everything_can_be_afforded() -> None:
    loss = by_stride(np.full((4, 3), 0.8))
    assert not who_refreshes_by_keys(loss, np.array([0.01, 0.4, 0.8]), 1.0).any()
