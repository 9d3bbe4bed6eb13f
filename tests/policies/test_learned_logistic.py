from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies import LearnedLogistic, StepSignals

SignalsOf = Callable[..., StepSignals]

# log-odds = -3 + 0.5 age + 2 (1 - similarity)
POLICY = LearnedLogistic(("age", "query_drift"), (0.5, 2), intercept=-3)


def test_log_odds_are_the_weighted_sum(signals_of: SignalsOf) -> None:
    signals = signals_of(age=[2, 4, 1], query_similarity=[0.5, 0.5, 1])
    assert POLICY.log_odds(signals).tolist() == [-1, 0, -2.5]


def test_a_unit_runs_full_from_even_odds_on(signals_of: SignalsOf) -> None:
    signals = signals_of(age=[2, 4, 5], query_similarity=0.5)
    assert POLICY.decide(signals).tolist() == [False, True, True]


def test_another_threshold_is_compared_by_its_log_odds(signals_of: SignalsOf) -> None:
    # Three to one: log 3 = 1.0986.
    cautious = LearnedLogistic(POLICY.features, POLICY.weights, POLICY.intercept, threshold=0.75)
    signals = signals_of(age=[6, 6.25, 7], query_similarity=0.5)
    assert cautious.log_odds(signals).tolist() == [1, 1.125, 1.5]
    assert cautious.decide(signals).tolist() == [False, True, True]


def test_weights_and_intercept_may_be_per_unit(signals_of: SignalsOf) -> None:
    policy = LearnedLogistic(("age", "query_drift"), (((1, 2), (3, 4)), 10), intercept=((0, 0), (-4, -4)))
    signals = signals_of(age=np.full((1, 2, 2), 2), query_similarity=0.5)
    assert policy.log_odds(signals).tolist() == [[[7, 9], [7, 9]]]
    assert policy.log_odds(signals_of(age=[[2, 1]], query_similarity=0.5, layer=1)).tolist() == [[7, 5]]


def test_with_no_features_the_intercept_decides_for_every_unit(signals_of: SignalsOf) -> None:
    for intercept, full in ((0.1, True), (-0.1, False)):
        policy = LearnedLogistic((), (), intercept)
        assert policy.decide(signals_of(age=np.ones((2, 3)))).tolist() == [[full] * 3] * 2


def test_a_missing_signal_runs_full_whatever_its_weight(signals_of: SignalsOf) -> None:
    for weight in (-100, 0, 100):
        policy = LearnedLogistic(("query_drift",), (weight,), intercept=-100)
        assert policy.decide(signals_of(query_similarity=[np.nan, 1])).tolist() == [True, False]


def test_it_needs_the_signals_of_its_features_only() -> None:
    assert POLICY.needs == {"query_similarity"}
    assert LearnedLogistic(("age", "inverse_age"), (1, 1), 0).needs == frozenset()
    churn = LearnedLogistic(("refresh_churn", "refresh_loss", "step_drift"), (1, 1, 1), 0)
    assert churn.needs == {"refresh_overlap", "refresh_mass", "step_similarity"}


@settings(max_examples=100, deadline=None)
@given(
    similarity=st.floats(-1, 1),
    age=st.integers(1, 500),
    intercept=st.floats(-8, 8),
    weights=st.tuples(st.floats(-0.5, 0.5), st.floats(-8, 8)),
    threshold=st.floats(0.01, 0.99),
)
def test_it_decides_as_the_sigmoid_would(
    signals_of: SignalsOf,
    similarity: float,
    age: int,
    intercept: float,
    weights: tuple[float, float],
    threshold: float,
) -> None:
    log_odds = intercept + weights[0] * age + weights[1] * (1 - similarity)
    probability = 1 / (1 + math.exp(-log_odds))
    assume(abs(probability - threshold) > 1e-9)  # A tie is decided by rounding.
    policy = LearnedLogistic(("age", "query_drift"), weights, intercept, threshold)
    assert policy.decide(signals_of(age=age, query_similarity=similarity)).item() == (probability >= threshold)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be a probability in \(0, 1\), not "):
        LearnedLogistic(("age",), (1,), 0, threshold)


def test_an_unknown_feature_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown feature 'entropy': known are age, sqrt_age, .*, refresh_churn\."):
        LearnedLogistic(("age", "entropy"), (1, 1), 0)


@pytest.mark.parametrize(("features", "weights"), [(("age",), (1, 2)), (("age", "sqrt_age"), (1,))])
def test_a_feature_without_a_weight_is_refused(features: tuple[str, ...], weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"exactly one weight, not .* with {len(weights)} weights"):
        LearnedLogistic(features, weights, 0)


def test_a_feature_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one weight"):
        LearnedLogistic(("age", "age"), (1, 2), 0)


def test_a_weight_that_is_not_finite_is_refused_by_its_feature() -> None:
    with pytest.raises(ValueError, match="weight of sqrt_age must be at least -inf, not nan"):
        LearnedLogistic(("age", "sqrt_age"), (1, float("nan")), 0)
