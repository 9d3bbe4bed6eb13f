from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies import FEATURES, MEASURED_SIGNALS, StepSignals

VALUES = {
    "age": 4.0,
    "sqrt_age": 2.0,
    "inverse_age": 0.25,
    "query_drift": 0.25,
    "step_drift": 1.5,
    "refresh_loss": 0.125,
    "refresh_churn": 0.625,
}


@pytest.fixture
def signals(signals_of: Callable[..., StepSignals]) -> StepSignals:
    return signals_of(
        age=4, query_similarity=0.75, step_similarity=-0.5, refresh_mass=0.875, refresh_overlap=0.375, n_full=7, step=9
    )


def test_every_feature_has_its_hand_computed_value(signals: StepSignals) -> None:
    assert {name: feature.of(signals).item() for name, feature in FEATURES.items()} == VALUES


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_nan_exactly_where_the_signal_that_it_needs_is(
    name: str, signals_of: Callable[..., StepSignals]
) -> None:
    feature = FEATURES[name]
    for signal in MEASURED_SIGNALS:
        measured = {other: [0.5, 0.5] for other in MEASURED_SIGNALS} | {signal: [0.5, np.nan]}
        missing = np.isnan(feature.of(signals_of(age=[3, 3], **measured)))
        assert missing.tolist() == [False, signal == feature.needs]


def test_features_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        FEATURES["age"] = FEATURES["sqrt_age"]  # type: ignore[index]
