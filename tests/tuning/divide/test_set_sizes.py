from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import Selection
from traces.sensitivity import Sensitivity
from traces.size_losses import SetLosses, SizeLosses
from tuning.divide.allocation import STRIDES, loss_by_stride
from tuning.divide.set_sizes import allocate_sizes, size_sets

SIZES = np.array([10, 20, 40])


def losses(by_age: np.ndarray) -> np.ndarray:
    """Losses `(sizes, strides, units)` over 5,000 steps of sets that lose `(sizes, max_age, units)`."""
    return np.stack([loss_by_stride(of, np.concatenate([of, [of[-1]] * (5000 - len(of))])) for of in by_age])


# By size and stride of three units: tokens help the first, full steps the second, nothing the third.
THREE = losses(np.array([[[0.9, 0.8, 0.1]] * 4, [[0.5, 0.8, 0.1]] * 4, [[0.1, 0.8, 0.1]] * 4]))


def test_tokens_go_to_the_unit_that_gains_by_them() -> None:
    # Full steps for one unit in three: the second unit takes them all.
    np.testing.assert_array_equal(allocate_sizes(THREE, SIZES, 1 / 3, 20), [40, 10, 10])


def test_a_unit_that_always_runs_full_has_the_least_set() -> None:
    lost = np.array([[[0.9, 9.0]] * 4, [[0.5, 5.0]] * 4, [[0.1, 1.0]] * 4])
    np.testing.assert_array_equal(allocate_sizes(losses(lost), SIZES, 0.51, 25), [40, 10])


def test_enough_tokens_for_everybody_are_given_to_everybody_who_gains() -> None:
    lost = np.array([[[0.9, 0.9]] * 4, [[0.5, 0.5]] * 4, [[0.1, 0.1]] * 4])
    np.testing.assert_array_equal(allocate_sizes(losses(lost), SIZES, 0.01, 40), [40, 40])


@given(seed=st.integers(0, 10**6), n_units=st.integers(1, 20), budget=st.floats(0.001, 1), share=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_the_mean_size_is_at_most_k(seed: int, n_units: int, budget: float, share: float) -> None:
    rng = np.random.default_rng(seed)
    # Larger sets lose less, and older ones more.
    lost = np.sort(rng.random((len(SIZES), 5, n_units)), axis=1)
    lost = np.sort(lost, axis=0)[::-1]
    k = 10 + 30 * share
    sizes = allocate_sizes(losses(lost), SIZES, budget, k)
    assert sizes.mean() <= k
    assert set(sizes) <= set(SIZES)


@pytest.mark.parametrize("seed", range(5))
def test_divided_sizes_lose_no_more_than_equal_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lost = np.sort(np.sort(rng.random((len(SIZES), 8, 30)), axis=1), axis=0)[::-1] * rng.uniform(0.1, 3, 30)
    budget, k = 0.1, 20

    def least(by_age: np.ndarray) -> float:
        """What the budget leaves at best, if rates between two strides may be had: the dual of the allocation."""
        loss, rates = losses(by_age[None])[0], 1 / STRIDES[:, None]
        prices = np.geomspace(1e-3, 1e2, 200)
        return max(float((loss + price * rates).min(0).mean() - price * budget) for price in prices)

    sizes = allocate_sizes(losses(lost), SIZES, budget, k)
    chosen = np.stack([lost[list(SIZES).index(size), :, unit] for unit, size in enumerate(sizes)], axis=1)
    assert least(chosen) < 0.95 * least(lost[1])


def test_less_than_the_least_size_is_refused() -> None:
    with pytest.raises(ValueError, match="sets of 9 tokens on average are below the least size, 10"):
        allocate_sizes(THREE, SIZES, 0.1, 9)


def test_the_selection_gets_sizes_with_its_k_as_their_mean_and_costs_follow_damage() -> None:
    rng = np.random.default_rng(0)
    model, selection = {"layers": 2, "kv_heads": 2}, Selection(20, sinks=2, window=4)
    lost = {name: SetLosses(*np.sort(rng.random((2, 3, 6, 2, 2)), axis=1)[:, ::-1].astype(np.float32)) for name in "ab"}
    damage = np.array([[0.04, 0.01], [0.0, 0.01]])
    sized = size_sets(selection, SizeLosses(model, {}, (10, 20, 40), lost), Sensitivity(model, {}, 6, {"a": damage}))
    assert sized.selection.unit_k is not None
    assert np.mean(sized.selection.unit_k) <= 20
    expected = np.sqrt(damage) / lost["a"].since_prompt[1].mean(0)
    expected = np.maximum(expected, 0.01 * expected.mean())
    np.testing.assert_allclose(sized.unit_cost, expected / expected.mean(), rtol=1e-6)
