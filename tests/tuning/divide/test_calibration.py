from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies import AlwaysFull, CosineThreshold, LearnedLogistic, NeverFull, StepPolicy
from traces import Trace
from tuning import TraceBatch, calibrate, replay_policy

MakeTrace = Callable[..., Trace]

N_STEPS, UNITS = 30, (2, 3)


@pytest.fixture(scope="module")
def traces(make_trace: MakeTrace) -> TraceBatch:
    return TraceBatch([make_trace(name, n_steps=N_STEPS, max_age=N_STEPS, seed=seed) for seed, name in enumerate("ab")])


def by_step(thresholds: np.ndarray) -> LearnedLogistic:
    """Full where the query moved far in one step: steps do not depend on each other, so every count can be reached."""
    return LearnedLogistic(("step_drift",), (1.0,), (thresholds - 2).tolist())


def by_cosine(thresholds: np.ndarray) -> CosineThreshold:
    return CosineThreshold(thresholds.tolist())


def share(traces: TraceBatch, policy: StepPolicy) -> np.ndarray:
    return replay_policy(traces, policy).unit_full_share


ONE_STEP = 1 / (2 * N_STEPS)


@pytest.mark.parametrize("seed", range(3))
def test_each_unit_runs_full_as_often_as_it_may_to_within_a_step(traces: TraceBatch, seed: int) -> None:
    rates = np.random.default_rng(seed).uniform(0, 1, UNITS)
    found = share(traces, by_step(calibrate(traces, by_step, rates, 0, 2, n_halvings=30)))
    assert (found <= rates).all()
    assert (found > rates - ONE_STEP).all()


def test_rates_that_are_counts_of_steps_are_reached_exactly(traces: TraceBatch) -> None:
    rates = np.array([[0, 1, 5], [17, 59, 60]]) / (2 * N_STEPS)
    found = share(traces, by_step(calibrate(traces, by_step, rates, -1, 3, n_halvings=30)))
    np.testing.assert_allclose(found, rates)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.33, 0.8, 1.0])
def test_one_number_is_the_mean_over_all_units_under_one_threshold(traces: TraceBatch, rate: float) -> None:
    thresholds = calibrate(traces, by_step, rate, -1, 3, n_halvings=30)
    assert len(np.unique(thresholds)) == 1
    found = share(traces, by_step(thresholds))
    assert rate - ONE_STEP / found.size < found.mean() <= rate
    if 0 < rate < 1:
        assert found.std() > 0


@pytest.mark.parametrize("seed", range(3))
def test_units_that_influence_their_own_future_do_not_exceed_their_rates(traces: TraceBatch, seed: int) -> None:
    rates = np.random.default_rng(seed).uniform(0, 1, UNITS)
    found = share(traces, by_cosine(calibrate(traces, by_cosine, rates, -1, 1)))
    assert (found <= rates).all()
    np.testing.assert_allclose(found, rates, atol=0.15)


def test_units_do_not_depend_on_each_other(traces: TraceBatch) -> None:
    rates = np.full(UNITS, 0.2)
    other = rates.copy()
    other[0, 1] = 0.9
    first, second = calibrate(traces, by_cosine, rates, -1, 1), calibrate(traces, by_cosine, other, -1, 1)
    assert second[0, 1] > first[0, 1]
    second[0, 1] = first[0, 1]
    np.testing.assert_array_equal(first, second)


def test_where_nothing_can_be_reached_it_stays_at_the_ends(traces: TraceBatch) -> None:
    always = calibrate(traces, lambda thresholds: AlwaysFull(), np.full(UNITS, 0.5), -3, 5)
    np.testing.assert_array_equal(always, -3)
    never = calibrate(traces, lambda thresholds: NeverFull(), np.full(UNITS, 0.5), -3, 5, n_halvings=40)
    np.testing.assert_allclose(never, 5)


def test_it_replays_once_per_halving_and_returns_double_precision(traces: TraceBatch) -> None:
    asked: list[np.ndarray] = []

    def policy_at(thresholds: np.ndarray) -> StepPolicy:
        asked.append(thresholds)
        return by_cosine(thresholds)

    found = calibrate(traces, policy_at, 0.3, -1, 1, n_halvings=5)
    assert (len(asked), found.dtype, found.shape) == (5, np.dtype("float64"), UNITS)
    np.testing.assert_array_equal(asked[0], np.zeros(UNITS))
