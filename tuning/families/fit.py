"""Fitting the logistic policy to traces."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from policies import FEATURES, LearnedLogistic, Schedule
from tuning.replay.trace_batch import TraceBatch, check_traced

DEFAULT_FEATURES = ("sqrt_age", "query_drift", "step_drift", "refresh_loss")


def fit_logistic(
    traces: TraceBatch,
    loss_weights: np.ndarray,
    positive_share: float,
    *,
    features: tuple[str, ...] = DEFAULT_FEATURES,
    regularisation: float = 1.0,
    n_samples: int = 60_000,
    seed: int = 0,
) -> LearnedLogistic:
    """Learn to tell the recycled steps that lose most from the others.

    A sample is a unit at a step with a set of some age, drawn evenly; it is positive if its weighted loss is among the
    `positive_share` largest. Each unit has an intercept of its own. The scaler is folded into the weights, so that the
    policy takes features as they are.

    Args:
        traces: What to learn from.
        loss_weights: `(layers, kv_heads)`, at least 0: what a unit of lost mass costs in each unit.
        positive_share: In (0, 1), usually near the budget.
        features: Names out of `policies.FEATURES`.
        regularisation: Inverse strength of the L2 penalty (scikit-learn's C).
        n_samples: Samples to draw.
        seed: Of the draw.

    Returns:
        A policy with threshold 0.5, which `calibrate` moves to a budget.

    Raises:
        ValueError: If a feature is unknown or needs a signal that traces do not record, or all samples have the same
            loss.
    """
    rng = np.random.default_rng(seed)
    columns, loss, unit = _samples(traces, features, n_samples, rng)
    loss = loss * loss_weights.ravel()[unit]
    # Where more samples than that have the largest loss, all of those are positive.
    limit = np.quantile(loss, 1 - positive_share)
    positive = loss > limit if limit < loss.max() else loss == limit
    if positive.all():
        raise ValueError("the traces give no contrast to learn from: every recycled step loses the same.")
    scaler = StandardScaler().fit(columns)
    n_units = loss_weights.size
    one_hot = csr_matrix((np.ones(len(unit)), (np.arange(len(unit)), unit)), shape=(len(unit), n_units))
    design = hstack([csr_matrix(scaler.transform(columns)), one_hot]).tocsr()
    model = LogisticRegression(C=regularisation, max_iter=500).fit(design, positive)
    weights = model.coef_[0, : len(features)] / scaler.scale_
    intercepts = model.intercept_[0] + model.coef_[0, len(features) :] - (weights * scaler.mean_).sum()
    return LearnedLogistic(
        features=features,
        weights=tuple(float(weight) for weight in weights),
        intercept=intercepts.reshape(traces.units).tolist(),
    )


def _samples(
    traces: TraceBatch, features: tuple[str, ...], n_samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features `(samples, features)`, lost mass and flat unit index `(samples,)` of random recycled steps."""
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        raise ValueError(f"unknown feature {unknown[0]!r}: known are {', '.join(FEATURES)}.")
    for name in features:
        needed = FEATURES[name].needs
        check_traced(set() if needed is None else {needed}, f"the feature {name!r}")
    step = rng.integers(0, traces.n_steps, n_samples)
    age = rng.integers(1, np.minimum(step + 1, traces.max_age) + 1)
    trace = rng.integers(0, len(traces), n_samples)
    unit = rng.integers(0, int(np.prod(traces.units)), n_samples)
    layer, head = np.unravel_index(unit, traces.units)
    at = (trace, step, age, layer, head)
    schedule = Schedule(np.zeros(n_samples))
    schedule.step, schedule.age = step.astype(np.float64), age.astype(np.float64)
    source = step - age
    schedule.refresh_mass = traces.fresh_mass[source + 1, trace, layer, head].astype(np.float64)
    if "refresh_churn" in features:
        # The set that a refresh replaces may have had any age; a prompt's set replaces none.
        age_before = rng.integers(1, np.clip(source + 1, 1, traces.max_age) + 1)
        before = traces.at_age("overlap", trace, np.maximum(source, 0), age_before, layer, head)
        schedule.refresh_overlap = np.where(source >= 0, before, 1.0)
    signals = schedule.signals(
        query_similarity=traces.at_age("query_similarity", *at),
        step_similarity=traces.at_age("query_similarity", trace, step, np.ones_like(step), layer, head),
        token=traces.step_tokens[step, trace, 0, 0],
    )
    columns = np.stack([FEATURES[name].of(signals) for name in features], axis=1)
    return columns, 1 - traces.at_age("recovered_mass", *at), unit
