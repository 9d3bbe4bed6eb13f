"""Ages that traces record, and what is between two of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.ages import all_ages, at_age, last_recorded, mean_by_age, recorded_ages, since_prompt

N_STEPS = 300


def thinned(every: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """An array `(steps, max_age)` of all ages at some of them, laid out as in a trace."""
    step = np.arange(len(every))[:, None]
    found = every[step, np.minimum(ages, step + 1) - 1]
    there_is_none = np.concatenate([[0], ages[:-1]]) >= step + 1
    return np.where(there_is_none, np.nan, found)


@pytest.mark.parametrize(
    ("max_age", "n_ages", "last"),
    [(1, 1, 1), (64, 64, 64), (65, 65, 65), (128, 68, 128), (1024, 80, 1024), (100, 67, 100)],
)
def test_ages_are_exact_and_then_geometric_up_to_the_oldest(max_age: int, n_ages: int, last: int) -> None:
    ages = recorded_ages(max_age)
    assert (len(ages), ages[-1]) == (n_ages, last)
    assert list(ages[:64]) == list(range(1, min(max_age, 64) + 1))
    steps = np.diff(ages[64:]) / np.array(ages[64:-1]) if len(ages) > 65 else np.zeros(0)
    assert (steps <= 0.2).all()


@given(max_age=st.integers(1, N_STEPS), seed=st.integers(0, 99))
def test_recorded_ages_are_told_as_they_are_and_what_changes_evenly_in_between_too(max_age: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slope, start = rng.random(N_STEPS), rng.random(N_STEPS)
    every = start[:, None] + slope[:, None] * np.arange(1, max_age + 1)
    ages = np.array(recorded_ages(max_age))
    step = rng.integers(0, N_STEPS, 200)
    age = rng.integers(1, step + 2)
    found = at_age(thinned(every, ages), ages, last_recorded(ages), step, age)
    np.testing.assert_allclose(found, every[step, np.minimum(age, max_age) - 1], rtol=1e-12)


def test_the_prompts_set_is_told_at_every_step_however_few_ages_are_recorded() -> None:
    every = np.random.default_rng(0).random((N_STEPS, N_STEPS))
    ages = np.array(recorded_ages(N_STEPS))
    step = np.arange(N_STEPS)
    values = thinned(every, ages)
    np.testing.assert_array_equal(at_age(values, ages, last_recorded(ages), step, step + 1), np.diagonal(every))
    np.testing.assert_array_equal(since_prompt(values, ages), np.diagonal(every))


def test_mean_by_age_is_over_the_steps_that_have_a_set_of_that_age() -> None:
    every = np.random.default_rng(0).random((N_STEPS, N_STEPS, 2))
    there_is_none = np.arange(N_STEPS) > np.arange(N_STEPS)[:, None]
    every[there_is_none] = np.nan
    all_of_them = np.arange(1, N_STEPS + 1)
    expected = np.nanmean(every, axis=0)
    np.testing.assert_allclose(mean_by_age(every, all_of_them), expected)
    ages = np.array(recorded_ages(N_STEPS))
    few = np.stack([thinned(every[..., unit], ages) for unit in range(2)], axis=-1)
    found = mean_by_age(few, ages)
    np.testing.assert_allclose(found[ages - 1], expected[ages - 1])
    np.testing.assert_allclose(found[69], np.average(found[[63, 75]], axis=0, weights=[6, 6]))


def test_all_ages_are_those_recorded_and_even_steps_between_them() -> None:
    found = all_ages(np.array([[1.0], [2.0], [8.0]]), np.array([1, 2, 5]))
    assert found[:, 0].tolist() == [1, 2, 4, 6, 8]
