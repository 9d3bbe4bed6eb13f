"""Dividing a budget of full steps among units by what refreshing each of them is worth."""

from __future__ import annotations

import itertools

import numpy as np

from tuning.divide.price import lowest_price

# Strides that allocation chooses among; between two of them it interpolates.
STRIDES = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096])

_ROUNDING = 1e-12
# Of the price of a full step.
_N_HALVINGS = 60


def loss_by_stride(by_age: np.ndarray, since_prompt: np.ndarray, strides: np.ndarray = STRIDES) -> np.ndarray:
    """Mean loss per step of an output, when a unit refreshes every S steps of it.

    The first refresh comes at step S - 1, as accounts without a burst have it; until then the prompt's set serves. So
    "never" is a stride like any other, and pays for what the prompt's set misses at the end of the output. A full step
    itself loses nothing.

    Args:
        by_age: `(max_age, ...)`, mean loss at each age; ages beyond take the last value.
        since_prompt: `(steps, ...)`, loss of the prompt's set at each step.
        strides: Whole strides S, at least 1.

    Returns:
        `(strides, ...)`.
    """
    nothing = np.zeros_like(by_age[:1])
    # Index n: of the first n steps since a refresh, or since the prompt.
    total, total_since_prompt = (
        np.concatenate([nothing, np.cumsum(losses, axis=0)]) for losses in (by_age, since_prompt)
    )
    n_steps, max_age = len(since_prompt), len(by_age)

    def after_refresh(n: int) -> np.ndarray:
        aged: np.ndarray = total[min(n, max_age)] + max(n - max_age, 0) * by_age[-1]
        return aged

    rows = []
    for stride in map(int, strides):
        n_first = min(stride - 1, n_steps)
        n_whole, n_left = divmod(n_steps - n_first, stride)
        loss = total_since_prompt[n_first] + n_whole * after_refresh(stride - 1)
        rows.append((loss + after_refresh(max(n_left - 1, 0))) / n_steps)
    return np.stack(rows)


def allocate(
    loss: np.ndarray, budget: float, strides: np.ndarray = STRIDES, full_cost: np.ndarray | None = None
) -> np.ndarray:
    """Rates of full steps that minimise the total loss under a budget.

    The loss of each unit is taken as the lower convex hull of its points (rate, loss); then buying the steepest
    segments first until the budget is spent is optimal (the fractional knapsack); equally steep ones share what is
    left. A stride between two points of the hull realises the interpolated loss closely, not exactly.

    Args:
        loss: `(strides, units)`, loss per step of each unit at each stride.
        budget: Mean of rate x cost over units, in (0, 1].
        strides: Strides of the rows, increasing.
        full_cost: `(units,)`, above 0: what a full step of each unit costs; None for 1.

    Returns:
        float64 `(units,)`: full steps per step, in [1 / strides[-1], 1].

    Raises:
        ValueError: If the budget is below the rate of the longest stride.
    """
    rates = 1 / strides.astype(np.float64)
    n_units = loss.shape[1]
    cost = np.ones(n_units) if full_cost is None else full_cost
    if budget < rates[-1]:
        raise ValueError(f"a budget of {budget:g} is below one full step in {strides[-1]}, the longest stride.")
    segments = [
        (-(loss[low, unit] - loss[high, unit]) / (cost[unit] * (rates[high] - rates[low])), unit, low, high)
        for unit in range(n_units)
        for low, high in _hull_segments(rates, loss[:, unit])
    ]
    allocated = np.full(n_units, rates[-1])
    left = budget * n_units - (cost * allocated).sum()
    for _, group in itertools.groupby(sorted(segments), key=lambda segment: segment[0]):
        equally_steep = list(group)
        wanted = sum(cost[unit] * (rates[high] - rates[low]) for _, unit, low, high in equally_steep)
        bought = min(wanted, left)
        for _, unit, low, high in equally_steep:
            allocated[unit] += (rates[high] - rates[low]) * bought / wanted
        left -= bought
        if left <= 0:
            break
    # Sums of segments miss 1 by a rounding: above it no policy accepts them, below it a unit would be denied a step.
    return np.where(allocated > 1 - _ROUNDING, 1.0, allocated)


def who_refreshes_by_keys(
    loss: np.ndarray, fresh_loss: np.ndarray, budget: float, strides: np.ndarray = STRIDES
) -> np.ndarray:
    """Which units should refresh by keys alone: at half the cost, a new set instead of the whole cache.

    Each unit takes the way and the stride of least loss + price x cost, with one price for all (Lagrange).

    Args:
        loss: `(strides, units)`, loss per step when full steps lose nothing.
        fresh_loss: `(units,)`, what a step loses over a new set.
        budget: Mean of rate x cost over units, in (0, 1].
        strides: Strides of the rows.

    Returns:
        bool `(units,)`.
    """
    rates = 1 / strides.astype(np.float64)[:, None]
    losses = np.stack([loss, loss + rates * fresh_loss])
    costs = np.stack([rates, rates / 2])

    def at(price: float) -> np.ndarray:
        chosen: np.ndarray = (losses + price * costs).reshape(-1, loss.shape[1]).argmin(0)
        return chosen

    highest = float(losses.max()) * float(strides[-1]) + 1.0
    price = lowest_price(lambda price: costs.reshape(-1)[at(price)].mean() > budget, highest, _N_HALVINGS)
    return at(price) >= len(strides)


def _hull_segments(rates: np.ndarray, loss: np.ndarray) -> list[tuple[int, int]]:
    """Segments of the lower convex hull that lower the loss, as index pairs (lower rate, higher rate)."""
    hull: list[int] = []
    for point in reversed(range(len(rates))):
        while len(hull) >= 2:
            before, last = hull[-2], hull[-1]
            slope_to_last = (loss[last] - loss[before]) * (rates[point] - rates[before])
            slope_to_point = (loss[point] - loss[before]) * (rates[last] - rates[before])
            if slope_to_last < slope_to_point:
                break
            hull.pop()
        hull.append(point)
    return [(low, high) for low, high in itertools.pairwise(hull) if loss[high] < loss[low]]
