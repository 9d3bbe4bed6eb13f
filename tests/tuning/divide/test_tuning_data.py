from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies import AlwaysFull, FixedStride, NeverFull
from traces import Trace
from traces.sensitivity import Sensitivity
from tuning import TraceBatch, TuningData, replay_policy
from tuning.divide.tuning_data import check_budget, unit_cost

MakeTrace = Callable[..., Trace]


def sensitivity(n_steps: int = 2, **kl: list[list[float]]) -> Sensitivity:
    return Sensitivity({}, {}, n_steps, {name: np.array(table, dtype=float) for name, table in kl.items()})


def losing(make_trace: MakeTrace, name: str, lost: list[list[float]], **sizes: int) -> Trace:
    """Every set of every age misses the same mass, one number per unit."""
    return make_trace(name, units=np.shape(lost), recovered_mass=1 - np.array(lost), **sizes)


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), -0.0, 1.0000001, float("inf")])
def test_a_budget_that_is_no_share_is_refused(make_trace: MakeTrace, budget: float) -> None:
    sentence = rf"share of unit-steps that may run full, in \(0, 1\], not {budget:g}\."
    with pytest.raises(ValueError, match=sentence):
        check_budget(budget)
    with pytest.raises(ValueError, match=sentence):
        TuningData(TraceBatch([make_trace()]), budget, np.ones((2, 3)))


@pytest.mark.parametrize("budget", [1e-9, 0.1, 1, 1.0])
def test_a_share_is_a_budget(budget: float) -> None:
    check_budget(budget)


def test_without_ablations_all_units_cost_the_same(make_trace: MakeTrace) -> None:
    traces = TraceBatch([make_trace("a"), make_trace("b", seed=1)])
    np.testing.assert_array_equal(unit_cost(traces, None), np.ones((2, 3)))
    np.testing.assert_array_equal(unit_cost(traces, sensitivity()), np.ones((2, 3)))
    other_prompt = sensitivity(c=[[9, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(unit_cost(traces, other_prompt), np.ones((2, 3)))


def test_cost_is_the_root_of_damage_per_lost_mass(make_trace: MakeTrace) -> None:
    trace = losing(make_trace, "a", [[0.1, 0.2], [0.5, 0.5]])
    # Root of damage over loss: 10, 30, 2, 6; mean 12.
    cost = unit_cost(TraceBatch([trace]), sensitivity(a=[[1, 36], [1, 9]]))
    np.testing.assert_allclose(cost, np.array([[10, 30], [2, 6]]) / 12, rtol=1e-6)


def test_cost_adds_up_ablated_prompts_and_passes_over_the_others(make_trace: MakeTrace) -> None:
    a = losing(make_trace, "a", [[0.1, 0.2]])
    b = losing(make_trace, "b", [[0.9, 0.9]])
    c = losing(make_trace, "c", [[0.3, 0.1]])
    cost = unit_cost(TraceBatch([c, b, a]), sensitivity(a=[[1, 1]], c=[[9, 1]]))
    # (1 + 3) / (0.1 + 0.3) and (1 + 1) / (0.2 + 0.1).
    expected = np.array([[10, 20 / 3]])
    np.testing.assert_allclose(cost, expected / expected.mean(), rtol=1e-6)


def test_cost_counts_the_ages_that_an_ablation_went_through(make_trace: MakeTrace) -> None:
    # Ages 1 and 2 miss 0.1 and 0.3 in the first unit, all ages 0.2 in the second; age 3 does not count, and stands in
    # for what the prompt's set is after it.
    lost = np.array([[0.1, 0.3, 0.9], [0.2, 0.2, 0.2]]).T[None, :, None, :]
    trace = make_trace("a", n_steps=5, max_age=3, units=(1, 2), recovered_mass=1 - lost)
    np.testing.assert_allclose(unit_cost(TraceBatch([trace]), sensitivity(2, a=[[1, 1]])), 1, rtol=1e-6)
    cost = unit_cost(TraceBatch([trace]), sensitivity(100, a=[[1, 1]]))
    expected = np.array([[5 / (0.1 + 0.3 + 3 * 0.9), 5 / 1.0]])
    np.testing.assert_allclose(cost, expected / expected.mean(), rtol=1e-6)


def test_no_unit_is_free(make_trace: MakeTrace) -> None:
    trace = losing(make_trace, "a", [[0.5, 0.5, 0.5, 0.5]])
    cost = unit_cost(TraceBatch([trace]), sensitivity(a=[[1, 0, 1, 4]]))
    # Floor: a hundredth of the mean cost; then scaled to mean 1 again.
    expected = np.array([[1, 0.01, 1, 2]])
    np.testing.assert_allclose(cost, expected / expected.mean(), rtol=1e-6)


def test_a_unit_that_loses_no_mass_costs_a_finite_amount(make_trace: MakeTrace) -> None:
    trace = losing(make_trace, "a", [[0.0, 0.5]])
    cost = unit_cost(TraceBatch([trace]), sensitivity(a=[[0, 1]]))
    assert np.isfinite(cost).all()
    assert cost.mean() == pytest.approx(1)


def test_ablations_without_any_damage_tell_no_unit_from_another(make_trace: MakeTrace) -> None:
    # As where sets hold the whole context.
    trace = losing(make_trace, "a", [[0.0, 0.0]])
    np.testing.assert_array_equal(unit_cost(TraceBatch([trace]), sensitivity(a=[[0, 0]])), [[1, 1]])


def test_loss_is_the_square_of_lost_mass_weighted_by_cost(make_trace: MakeTrace) -> None:
    trace = losing(make_trace, "a", [[0.1, 0.2], [0.3, 0.4]])
    cost = np.array([[0.4, 0.8], [1.2, 1.6]])
    data = TuningData(TraceBatch([trace, trace]), 0.5, cost)
    expected = ((0.1 * 0.4 + 0.2 * 0.8 + 0.3 * 1.2 + 0.4 * 1.6) / 4) ** 2
    assert data.loss(NeverFull()) == pytest.approx(expected, rel=1e-6)
    assert data.loss(FixedStride(2)) == pytest.approx(expected / 2, rel=1e-6)
    assert data.loss(AlwaysFull()) == 0


def test_loss_with_equal_costs_is_the_mean_square_of_what_steps_lost(make_trace: MakeTrace) -> None:
    traces = TraceBatch([make_trace(name, seed=seed) for seed, name in enumerate("abc")])
    policy = FixedStride(((1, 2, 3), (4, 5, 6)))
    data, replay = TuningData(traces, 0.1, np.ones((2, 3))), replay_policy(traces, policy)
    assert data.loss(policy) == pytest.approx((replay.lost_mass.mean((2, 3)) ** 2).mean(), rel=1e-6)
    assert data.loss_of(replay) == data.loss(policy)


def test_units_that_lose_at_the_same_step_cost_more_than_in_turn(make_trace: MakeTrace) -> None:
    data = TuningData(TraceBatch([losing(make_trace, "a", [[0.5, 0.5]])]), 0.5, np.ones((1, 2)))
    together, in_turn = FixedStride(2), FixedStride(2, ((0, 1),))
    assert data.loss(together) == pytest.approx(2 * data.loss(in_turn), rel=1e-6)


def ageing(make_trace: MakeTrace, speeds: list[list[float]], **sizes: int) -> TraceBatch:
    ages = np.arange(1, sizes.get("max_age", 4) + 1)[None, :, None, None]
    return TraceBatch([make_trace(units=np.shape(speeds), recovered_mass=np.exp(-ages * np.array(speeds)), **sizes)])


def test_rates_spend_the_budget_where_it_is_worth_most(make_trace: MakeTrace) -> None:
    traces = ageing(make_trace, [[0.01, 0.02], [0.04, 0.16]], n_steps=32, max_age=32)
    rates = TuningData(traces, 0.2, np.ones((2, 2))).divide(1.0).rates
    assert rates.shape == (2, 2)
    assert rates.mean() == pytest.approx(0.2)
    assert (np.diff(rates.ravel()) >= 0).all()
    assert rates[1, 1] > 2 * rates[0, 0]


def test_sharpness_is_how_much_unit_costs_count(make_trace: MakeTrace) -> None:
    traces = ageing(make_trace, [[0.05, 0.05, 0.05]], n_steps=32, max_age=32)
    data = TuningData(traces, 0.2, np.array([[0.03, 0.27, 2.7]]))
    np.testing.assert_allclose(data.divide(0.0).rates, 0.2)
    blunt, sharp = data.divide(0.3).rates, data.divide(1.0).rates
    assert blunt[0, 0] < blunt[0, 1] < blunt[0, 2]
    assert sharp[0, 2] > blunt[0, 2]


def test_ages_that_no_step_could_have_do_not_disturb_rates(make_trace: MakeTrace) -> None:
    traces = ageing(make_trace, [[0.05, 0.1]], n_steps=6, max_age=20)
    shorter = ageing(make_trace, [[0.05, 0.1]], n_steps=6, max_age=6)
    rates = TuningData(traces, 0.3, np.ones((1, 2))).divide(1.0).rates
    np.testing.assert_allclose(rates, TuningData(shorter, 0.3, np.ones((1, 2))).divide(1.0).rates)
