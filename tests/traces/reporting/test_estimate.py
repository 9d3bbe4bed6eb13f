"""Means over prompts: their intervals against hand-counted cases and scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from traces.reporting.estimate import Estimate, bootstrap, bootstrap_ratio


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(5).lognormal(-1, 0.8, 24)


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(6).lognormal(0, 0.8, 24)


def test_one_prompt_has_no_width() -> None:
    assert bootstrap(np.array([0.25])) == Estimate(0.25, 0.25, 0.25)


def test_equal_prompts_have_no_width() -> None:
    assert bootstrap(np.full(9, 0.5)) == Estimate(0.5, 0.5, 0.5)


def test_two_prompts_reach_from_one_to_the_other() -> None:
    # A quarter of the resamples draws the same prompt twice, on each side.
    assert bootstrap(np.array([1.0, 3.0])) == Estimate(2.0, 1.0, 3.0)


def test_many_coins_have_the_interval_of_the_binomial() -> None:
    coins = np.repeat([0.0, 1.0], 50)
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.5) / 100
    estimate = bootstrap(coins, n_resamples=40_000)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.0101)


def test_the_interval_is_scipy_s_percentile_bootstrap(values: np.ndarray) -> None:
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=40_000, rng=1).confidence_interval
    ours = bootstrap(values, n_resamples=40_000)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.015)


def test_a_ratio_is_scipy_s_paired_percentile_bootstrap(values: np.ndarray, reference: np.ndarray) -> None:
    def ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(x.mean(axis) / y.mean(axis))

    theirs = stats.bootstrap(
        (values, reference), ratio, paired=True, method="percentile", n_resamples=40_000, rng=1
    ).confidence_interval
    ours = bootstrap_ratio(values, reference, n_resamples=40_000)
    assert ours.value == pytest.approx(values.mean() / reference.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_a_constant_ratio_is_certain_however_prompts_differ(reference: np.ndarray) -> None:
    estimate = bootstrap_ratio(0.4 * reference, reference)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.4, 0.4, 0.4))


def test_the_same_seed_gives_the_same_interval(values: np.ndarray, reference: np.ndarray) -> None:
    assert bootstrap(values) == bootstrap(values.copy())
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap_ratio(values, reference) == bootstrap_ratio(values.copy(), reference.copy())
    assert bootstrap_ratio(values, reference) != bootstrap_ratio(values, reference, seed=1)


def test_bootstrapping_leaves_numpy_s_global_generator_alone(values: np.ndarray) -> None:
    before = np.random.get_state()[1].copy()
    bootstrap(values)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_an_estimate_reads_as_value_and_interval() -> None:
    assert str(Estimate(0.12345, 0.1, 0.2)) == "0.123 [0.100, 0.200]"
