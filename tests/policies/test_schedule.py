from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import Schedule

Values = Callable[[Any], Any]


@pytest.fixture(params=["numpy", "torch"])
def values(request: pytest.FixtureRequest) -> Values:
    """Makes an array of the library under test."""
    return np.array if request.param == "numpy" else lambda numbers: torch.tensor(np.array(numbers))


@pytest.fixture
def zeros(values: Values) -> Any:
    return values([[0.0, 0.0, 0.0]])


def test_prefill_leaves_sets_of_age_one_and_no_full_steps(zeros: Any) -> None:
    signals = Schedule(zeros).signals()
    assert (signals.step.tolist(), signals.age.tolist(), signals.n_full.tolist()) == ([[0] * 3], [[1] * 3], [[0] * 3])
    for unmeasured in (
        signals.query_similarity,
        signals.step_similarity,
        signals.layer_similarity,
        signals.refresh_mass,
        signals.refresh_overlap,
        signals.token,
    ):
        assert unmeasured.shape == zeros.shape
        assert (unmeasured != unmeasured).all()


def test_a_full_step_is_counted_and_makes_the_next_age_one(zeros: Any, values: Values) -> None:
    schedule = Schedule(zeros)
    seen = []
    for full in ([[True, False, False]], [[True, False, True]], [[False, False, True]]):
        schedule.advance(values(full))
        seen.append([array.tolist() for array in (schedule.step, schedule.age, schedule.n_full)])
    assert seen == [
        [[[1, 1, 1]], [[1, 2, 2]], [[1, 0, 0]]],
        [[[2, 2, 2]], [[1, 3, 1]], [[2, 0, 1]]],
        [[[3, 3, 3]], [[2, 4, 1]], [[2, 0, 2]]],
    ]


def test_refresh_signals_change_only_where_a_unit_ran_full(zeros: Any, values: Values) -> None:
    schedule = Schedule(zeros, refresh_mass=values([[0.9, 0.8, 0.7]]))
    assert schedule.signals().refresh_mass.tolist() == [[0.9, 0.8, 0.7]]
    schedule.advance(values([[True, False, False]]), values([[0.1, 0.2, 0.3]]), values([[0.4, 0.5, 0.6]]))
    assert schedule.signals().refresh_mass.tolist() == [[0.1, 0.8, 0.7]]
    # Sets that prefill chose replaced none: their overlap stays NaN until the unit's first full step.
    np.testing.assert_array_equal(np.array(schedule.signals().refresh_overlap.tolist()), [[0.4, np.nan, np.nan]])
    schedule.advance(values([[False, True, False]]), values([[0.0, 0.25, 0.0]]), values([[0.0, 0.75, 0.0]]))
    assert schedule.signals().refresh_mass.tolist() == [[0.1, 0.25, 0.7]]
    np.testing.assert_array_equal(np.array(schedule.signals().refresh_overlap.tolist()), [[0.4, 0.75, np.nan]])


def test_signals_carry_what_was_measured_at_this_step_and_where(zeros: Any, values: Values) -> None:
    query, step = values([[0.1, 0.2, 0.3]]), values([[0.4, 0.5, 0.6]])
    reasons: dict[str, Any] = {}
    schedule = Schedule(zeros, layer=3)
    signals = schedule.signals(query, step, reasons)
    assert (signals.query_similarity is query, signals.step_similarity is step) == (True, True)
    assert signals.reasons is reasons
    assert signals.layer == 3
    assert Schedule(zeros).signals().layer is None
    # What was measured at one step says nothing about the next.
    following = schedule.signals()
    assert (following.query_similarity != following.query_similarity).all()
    assert (following.step_similarity != following.step_similarity).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "float64"])
def test_tokens_and_layers_are_spread_over_units_as_float64(zeros: Any, values: Values, dtype: str) -> None:
    token, cosine = values(np.array([[30]], dtype=dtype)), values([[0.25]])
    signals = Schedule(zeros).signals(layer_similarity=cosine, token=token)
    assert (signals.token.tolist(), signals.layer_similarity.tolist()) == ([[30.0] * 3], [[0.25] * 3])
    assert signals.token.dtype == signals.layer_similarity.dtype == zeros.dtype
    following = Schedule(zeros).signals()
    assert (following.token != following.token).all()


def test_signals_already_handed_out_do_not_change_with_later_steps(zeros: Any, values: Values) -> None:
    schedule = Schedule(zeros, refresh_mass=values([[0.9, 0.8, 0.7]]))
    signals = schedule.signals()
    schedule.advance(values([[True, True, True]]), values([[0.1, 0.2, 0.3]]), values([[0.4, 0.5, 0.6]]))
    assert (signals.step.tolist(), signals.age.tolist(), signals.n_full.tolist()) == ([[0] * 3], [[1] * 3], [[0] * 3])
    assert signals.refresh_mass.tolist() == [[0.9, 0.8, 0.7]]
    assert zeros.tolist() == [[0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(n_steps=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_torch_keeps_the_same_books_as_numpy_in_float64(n_steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 3)
    mass = rng.random(shape)
    mine = Schedule(np.zeros(shape), mass)
    theirs = Schedule(torch.zeros(shape, dtype=torch.float64), torch.tensor(mass))
    last_full = np.full(shape, -1)
    for step in range(n_steps):
        full, mass, overlap = rng.random(shape) < 0.3, rng.random(shape), rng.random(shape)
        last_full[full] = step
        mine.advance(full, mass, overlap)
        theirs.advance(torch.tensor(full), torch.tensor(mass), torch.tensor(overlap))
    for name in ("step", "age", "n_full", "refresh_mass", "refresh_overlap"):
        assert getattr(theirs, name).dtype == torch.float64
        assert getattr(mine, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(theirs, name).numpy(), getattr(mine, name))
    np.testing.assert_array_equal(mine.age, n_steps - last_full)
