from __future__ import annotations

from collections.abc import Callable

import numpy as np

from traces import Trace
from traces.summary import SIMILARITY_EDGES, Summary, quantiles_by_similarity, quantiles_over_units

MakeTrace = Callable[..., Trace]
NAN = np.nan


def test_quantiles_over_units_are_taken_at_each_age() -> None:
    by_unit = np.array([[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, NAN]], [[NAN, NAN], [NAN, NAN]]])
    np.testing.assert_array_equal(quantiles_over_units(by_unit, (0.0, 0.5, 1.0)).T[0], [0.0, 1.5, 3.0])
    np.testing.assert_array_equal(quantiles_over_units(by_unit, (0.0, 0.5, 1.0)).T[1], [5.0, 5.0, 5.0])
    assert np.isnan(quantiles_over_units(by_unit, (0.0, 0.5, 1.0)).T[2]).all()


def test_quantiles_by_similarity_are_right_to_a_bin_of_mass(make_trace: MakeTrace) -> None:
    trace = make_trace(n_steps=60, max_age=8, units=(4, 4))
    row = 120
    inside = (trace.query_similarity >= SIMILARITY_EDGES[row]) & (trace.query_similarity < SIMILARITY_EDGES[row + 1])
    quantiles = quantiles_by_similarity(Summary.of(trace), (0.1, 0.5, 0.9))
    # A quantile may be anywhere between the two values that it parts.
    low = np.quantile(trace.recovered_mass[inside], (0.1, 0.5, 0.9), method="lower")
    high = np.quantile(trace.recovered_mass[inside], (0.1, 0.5, 0.9), method="higher")
    assert (quantiles[:, row] >= low - 0.01).all()
    assert (quantiles[:, row] <= high + 0.01).all()


def test_quantiles_by_similarity_are_nan_where_no_value_is(make_trace: MakeTrace) -> None:
    summary = Summary.of(make_trace())
    filled = summary.joint.any(axis=1)
    assert 0 < filled.sum() < len(filled)
    np.testing.assert_array_equal(~np.isnan(quantiles_by_similarity(summary, (0.5,))[0]), filled)
