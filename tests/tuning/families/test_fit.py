from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from policies import FEATURES, Feature, LearnedLogistic, policy_from_json, policy_to_json
from traces import Trace
from tuning import TraceBatch, fit_logistic, replay_policy

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)
EVEN = np.ones(UNITS)
KNOWN = LearnedLogistic(
    ("sqrt_age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"),
    (0.4, 1.5, -1.0, 2.0, -0.8),
    ((-3.0, -2.0, -1.0), (-2.5, -1.5, -0.5)),
)


@pytest.fixture(scope="module")
def traces(make_trace: MakeTrace) -> TraceBatch:
    return TraceBatch([make_trace(name, n_steps=40, max_age=20, seed=seed) for seed, name in enumerate("abc")])


def following(known: LearnedLogistic, make_trace: MakeTrace, seed: int, n_steps: int = 60, max_age: int = 40) -> Trace:
    """A trace whose sets lose everything with the probability of a known model, and else nothing."""
    rng = np.random.default_rng(seed)
    by_age = (n_steps, max_age, *UNITS)
    similarity = rng.uniform(-1, 1, by_age)
    fresh = rng.uniform(0, 1, (n_steps + 1, *UNITS))
    # The same whatever set was replaced, so that each step has one number. The prompt's set replaced none.
    overlap_at = rng.uniform(0, 1, (n_steps, *UNITS))
    source = np.arange(n_steps)[:, None] - np.arange(1, max_age + 1)
    age = np.broadcast_to(np.arange(1.0, max_age + 1)[None, :, None, None], by_age)
    value = {
        "sqrt_age": np.sqrt(age),
        "query_drift": 1 - similarity,
        "step_drift": 1 - similarity[:, :1],
        "refresh_loss": 1 - fresh[np.maximum(source + 1, 0)],
        "refresh_churn": np.where(source[..., None, None] >= 0, 1 - overlap_at[np.maximum(source, 0)], 0),
    }
    log_odds = np.asarray(known.intercept) + sum(
        weight * value[name] for name, weight in zip(known.features, known.weights, strict=True)
    )
    return make_trace(
        str(seed),
        n_steps=n_steps,
        max_age=max_age,
        recovered_mass=rng.random(by_age) >= expit(log_odds),
        query_similarity=similarity,
        overlap=overlap_at[:, None],
        fresh_mass=fresh,
    )


def test_a_known_model_is_recovered(make_trace: MakeTrace) -> None:
    traces = TraceBatch([following(KNOWN, make_trace, seed) for seed in range(10)])
    fitted = fit_logistic(traces, EVEN, 0.9, features=KNOWN.features, regularisation=1e3)
    np.testing.assert_allclose(fitted.weights, KNOWN.weights, atol=0.15)
    np.testing.assert_allclose(fitted.intercept, KNOWN.intercept, atol=0.25)
    assert (fitted.features, fitted.threshold) == (KNOWN.features, 0.5)


def test_only_the_intercept_differs_between_units(traces: TraceBatch) -> None:
    fitted = fit_logistic(traces, EVEN, 0.2, n_samples=5000)
    assert all(isinstance(weight, float) for weight in fitted.weights)
    assert np.shape(fitted.intercept) == UNITS
    assert len(np.unique(fitted.intercept)) == 6


def test_a_unit_in_which_loss_costs_more_has_a_higher_intercept(traces: TraceBatch) -> None:
    cost = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 5.0]])
    intercept = np.asarray(fit_logistic(traces, cost, 0.2, n_samples=5000).intercept)
    assert intercept.argmax() == 5
    intercept = np.asarray(fit_logistic(traces, 1 / cost, 0.2, n_samples=5000).intercept)
    assert intercept.argmin() == 5


def test_the_scaler_is_folded_into_the_weights(traces: TraceBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Scaler(StandardScaler):
        def fit(self, X: np.ndarray) -> Scaler:
            seen["raw"] = X
            return super().fit(X)

    class Model(LogisticRegression):
        def fit(self, X: Any, y: np.ndarray) -> Model:
            seen.update(design=X, positive=y, model=self)
            return super().fit(X, y)

    monkeypatch.setattr("tuning.families.fit.StandardScaler", Scaler)
    monkeypatch.setattr("tuning.families.fit.LogisticRegression", Model)
    features = tuple(FEATURES)
    fitted = fit_logistic(traces, EVEN, 0.15, features=features, regularisation=0.3, n_samples=4000)

    columns = seen["raw"]
    assert columns.shape == (4000, len(features))
    design = seen["design"].toarray()
    scaled, one_hot = design[:, : len(features)], design[:, len(features) :]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
    np.testing.assert_array_equal(one_hot.sum(1), 1)
    log_odds = columns @ np.array(fitted.weights) + np.ravel(fitted.intercept)[one_hot.argmax(1)]
    np.testing.assert_allclose(log_odds, seen["model"].decision_function(seen["design"]), rtol=1e-9, atol=1e-9)
    assert seen["positive"].mean() == pytest.approx(0.15, abs=0.001)
    assert seen["model"].C == 0.3


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The features of the samples, raw, one table per fit."""
    seen: list[np.ndarray] = []

    class Scaler(StandardScaler):
        def fit(self, X: np.ndarray) -> Scaler:
            seen.append(X)
            return super().fit(X)

    monkeypatch.setattr("tuning.families.fit.StandardScaler", Scaler)
    return seen


def test_samples_are_steps_that_a_replay_could_meet(make_trace: MakeTrace, columns: list[np.ndarray]) -> None:
    # More ages than steps: those that no step could have are NaN, and a model of NaN cannot be fitted.
    traces = TraceBatch([make_trace(name, n_steps=8, max_age=20, seed=seed) for seed, name in enumerate("ab")])
    fit_logistic(traces, EVEN, 0.2, features=tuple(FEATURES), n_samples=3000)
    assert sorted(set(columns[0][:, 0])) == list(range(1, 9))


def test_the_set_of_the_prompt_replaced_none(make_trace: MakeTrace, columns: list[np.ndarray]) -> None:
    # One step has no other set; where there are two, the second may use the set of the first.
    for n_steps, churns in ((1, {0.0}), (2, {0.0, 0.75})):
        traces = TraceBatch([make_trace(n_steps=n_steps, overlap=np.float32(0.25))])
        fit_logistic(traces, EVEN, 0.2, features=("refresh_churn",), n_samples=500)
        assert set(columns[-1].ravel()) == churns


def test_the_same_seed_gives_the_same_policy_and_another_seed_another(traces: TraceBatch) -> None:
    first, again, other = (fit_logistic(traces, EVEN, 0.2, n_samples=2000, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_less_regularisation_gives_larger_weights(traces: TraceBatch) -> None:
    size = [
        np.abs(fit_logistic(traces, EVEN, 0.2, n_samples=2000, regularisation=strength).weights).sum()
        for strength in (1e-6, 1e-3, 10)
    ]
    assert size[0] < size[1] < size[2]


def test_a_column_that_does_not_vary_does_no_harm(make_trace: MakeTrace) -> None:
    trace = make_trace(n_steps=20, query_similarity=np.float32(0.25))
    fitted = fit_logistic(TraceBatch([trace]), EVEN, 0.2, n_samples=1000)
    assert np.isfinite(fitted.weights).all()
    assert np.isfinite(fitted.intercept).all()


def test_a_fitted_policy_can_be_replayed_and_written(traces: TraceBatch) -> None:
    fitted = fit_logistic(traces, EVEN, 0.4, features=tuple(FEATURES), n_samples=2000)
    again = policy_from_json(policy_to_json(fitted))
    assert again == fitted
    np.testing.assert_array_equal(replay_policy(traces, again).full, replay_policy(traces, fitted).full)


def test_an_unknown_feature_is_refused_with_the_known_ones(traces: TraceBatch) -> None:
    with pytest.raises(ValueError, match=r"unknown feature 'mood': known are age, sqrt_age, .*refresh_churn"):
        fit_logistic(traces, EVEN, 0.2, features=("age", "mood"))


@pytest.mark.parametrize("mass", [1.0, 0.25])
def test_traces_without_contrast_are_refused(make_trace: MakeTrace, mass: float) -> None:
    trace = make_trace(n_steps=20, recovered_mass=np.float32(mass))
    with pytest.raises(ValueError, match="no contrast to learn from: every recycled step loses the same"):
        fit_logistic(TraceBatch([trace]), EVEN, 0.2, n_samples=1000)


def test_where_many_lose_equally_much_those_are_told_from_the_others(make_trace: MakeTrace) -> None:
    # Half of the sets lose everything, the others nothing; a tenth is asked for.
    traces = TraceBatch([following(KNOWN, make_trace, seed) for seed in range(2)])
    fitted = fit_logistic(traces, EVEN, 0.1, features=KNOWN.features, regularisation=1e3, n_samples=20_000)
    np.testing.assert_allclose(fitted.weights, KNOWN.weights, atol=0.25)


def test_a_feature_of_a_signal_that_traces_do_not_record_is_refused(
    traces: TraceBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = Feature("layer_similarity", lambda signals: 1 - signals.layer_similarity)
    monkeypatch.setattr("tuning.families.fit.FEATURES", {**FEATURES, "layer_drift": drift})
    with pytest.raises(ValueError, match="the feature 'layer_drift' needs the signal 'layer_similarity', which traces"):
        fit_logistic(traces, EVEN, 0.1, features=("age", "layer_drift"))


def test_a_feature_of_the_token_that_is_fed_is_fitted(traces: TraceBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    token = Feature(None, lambda signals: seen.append((signals.step, signals.token)) or signals.token)  # type: ignore[func-returns-value]
    monkeypatch.setattr("tuning.families.fit.FEATURES", {**FEATURES, "token": token})
    monkeypatch.setattr("policies.learned_logistic.FEATURES", {**FEATURES, "token": token})
    fit_logistic(traces, EVEN, 0.1, features=("age", "token"), n_samples=50)
    (step, fed), *_ = seen
    at_step = traces.step_tokens[:, :, 0, 0][step.astype(int)]
    assert (fed[:, None] == at_step).any(1).all()
