"""Hindsight keeps the budget, finds what can be seen by hand, and loses less than a clock."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import FixedStride
from traces import Trace
from tuning import TraceBatch, replay_policy
from tuning.divide.hindsight import hindsight
from tuning.divide.tuning_data import TuningData

MakeTrace = Callable[..., Trace]
# At [t, a - 1]; 9 stands where there is no such set.
MASS = np.array([[0.9, 9, 9, 9], [0.8, 0.7, 9, 9], [0.6, 0.5, 0.4, 9], [0.3, 0.2, 0.1, 0.05]])


def loss_of(full: np.ndarray, batch: TraceBatch, cost: np.ndarray) -> float:
    """The replay loss of given full steps, step by step."""
    age = np.zeros(batch.shape, dtype=int)
    recovered_mass = np.stack([trace.recovered_mass for trace in batch.traces], axis=2)
    total = []
    for step in range(batch.n_steps):
        index = np.minimum(age, batch.max_age - 1)
        lost = 1 - np.take_along_axis(recovered_mass[step], index[None], 0)[0].astype(np.float64)
        total.append((np.where(full[step], 0, lost) * cost).mean((1, 2)) ** 2)
        age = np.where(full[step], 0, age + 1)
    return float(np.mean(total))


def test_the_one_full_step_of_four_is_the_one_that_saves_most(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace(n_steps=4, max_age=4, units=(1, 1), recovered_mass=MASS[..., None, None])])
    full = hindsight(batch, np.ones((1, 1)), 0.25)
    # Sums of squares of what is lost, with the full step at 0, 1, 2, 3: 1.10, 0.81, 0.59, 0.46.
    assert full[:, 0, 0, 0].tolist() == [False, False, False, True]
    assert loss_of(full, batch, np.ones((1, 1))) == pytest.approx(0.46 / 4, abs=1e-6)


def test_units_that_cost_nothing_get_nothing(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace(n_steps=8, max_age=8)])
    cost = np.zeros(batch.units)
    cost[1, 2] = 1
    full = hindsight(batch, cost, 1 / cost.size)
    assert full[:, 0, 1, 2].all()
    assert full.sum() == 8


@given(seed=st.integers(0, 10**6), budget=st.floats(0.01, 1))
@settings(deadline=None, max_examples=30)
def test_the_budget_is_kept_on_every_trace(make_trace: MakeTrace, seed: int, budget: float) -> None:
    batch = TraceBatch([make_trace(seed=seed), make_trace("two", seed=seed + 1)])
    full = hindsight(batch, np.ones(batch.units), budget)
    assert full.shape == (batch.n_steps, *batch.shape)
    assert (full.mean((0, 2, 3)) <= budget).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stride", [2, 5])
def test_it_loses_less_than_a_clock_of_the_same_share(make_trace: MakeTrace, seed: int, stride: int) -> None:
    batch = TraceBatch([make_trace(n_steps=20, max_age=20, seed=seed)])
    cost = np.random.default_rng(seed).uniform(0.1, 3, batch.units)
    data = TuningData(batch, 1 / stride, cost)
    assert loss_of(hindsight(batch, cost, 1 / stride), batch, cost) < 0.9 * data.loss(FixedStride(stride))


def test_a_replayed_clock_loses_what_these_tests_say_it_loses(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace(n_steps=12, max_age=5)])
    cost = np.ones(batch.units)
    full = replay_policy(batch, FixedStride(3)).full
    assert loss_of(full, batch, cost) == pytest.approx(TuningData(batch, 0.5, cost).loss(FixedStride(3)), rel=1e-6)
