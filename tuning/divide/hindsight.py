"""The schedule of somebody who knows the future: the most that deciding well could gain."""

from __future__ import annotations

import numpy as np

from tuning.divide.price import lowest_price
from tuning.divide.tuning_data import check_budget
from tuning.replay.trace_batch import TraceBatch

# Halvings of the price of a full unit-step, and rounds of weighing steps by what they lose.
_N_HALVINGS = 24
_N_ROUNDS = 4


def hindsight(traces: TraceBatch, unit_cost: np.ndarray, budget: float) -> np.ndarray:
    """Full steps that lose least on each trace, chosen with the whole trace in sight.

    Every unit has its own shortest path over (step, age), where a full step costs a price that is the same for all
    units of a trace, and found such that they keep the budget together (Lagrange). The replay loss is a square over
    units, so steps are weighed by what all units lose there, and paths are sought again (Frank-Wolfe); the best round
    counts. No accounts: units may spend when they like. Not exactly optimal for the square, and for a sum it is.

    Args:
        traces: What happens.
        unit_cost: `(layers, kv_heads)`, at least 0.
        budget: Share of unit-steps of each trace that may run full, in (0, 1].

    Returns:
        bool `(steps, traces, layers, kv_heads)`.
    """
    check_budget(budget)
    n_units = unit_cost.size
    full = np.empty((traces.n_steps, len(traces), n_units), dtype=bool)
    for trace in range(len(traces)):
        # Ages that no set has yet are never met.
        lost = np.nan_to_num(1 - traces.at_all_ages("recovered_mass", trace)) * unit_cost.ravel()
        full[:, trace] = _of_trace(lost, budget)
    return full.reshape(traces.n_steps, *traces.shape)


def _of_trace(lost: np.ndarray, budget: float) -> np.ndarray:
    """The same for weighted lost mass `(steps, max_age, units)` of one trace."""
    weight = np.ones(len(lost))
    best, least = np.zeros((len(lost), lost.shape[2]), dtype=bool), np.inf
    for _ in range(_N_ROUNDS):
        weighted = lost * weight[:, None, None]

        def full_at(price: float, weighted: np.ndarray = weighted) -> np.ndarray:
            return follow(lost, _when_to_pay(weighted, price))[0]

        highest = float(weight.max() * lost.max()) * lost.shape[0] + 1.0
        affordable = full_at(lowest_price(lambda price: full_at(price).mean() > budget, highest, _N_HALVINGS))
        perturbation = follow_given(lost, affordable).mean(1)
        if (squared := float((perturbation**2).mean())) < least:
            best, least = affordable, squared
        if perturbation.any():
            weight = (weight + perturbation / perturbation.mean()) / 2
    return best


def _when_to_pay(lost: np.ndarray, price: float) -> np.ndarray:
    """Whether to run full at a step and age `(steps, max_age, units)`, when all that follows is done best."""
    n_steps, max_age, n_units = lost.shape
    pays = np.empty(lost.shape, dtype=bool)
    # Least cost from the next step on, by the age that the set then has.
    ahead = np.zeros((max_age, n_units))
    older = np.minimum(np.arange(max_age) + 1, max_age - 1)
    for step in reversed(range(n_steps)):
        recycled, full = lost[step] + ahead[older], price + ahead[:1]
        pays[step] = full < recycled
        ahead = np.minimum(recycled, full)
    return pays


def follow(lost: np.ndarray, pays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Full steps and lost mass `(steps, units)` of running full where it pays, from the end of prefill on.

    Args:
        lost: `(steps, max_age, units)`: what a set of each age loses; older ones lose as the oldest.
        pays: bool of the same shape: whether to run full at a step, by the age of the set.
    """
    n_steps, max_age, n_units = lost.shape
    units, index = np.arange(n_units), np.zeros(n_units, dtype=np.intp)
    full, left = np.empty((n_steps, n_units), dtype=bool), np.empty((n_steps, n_units))
    for step in range(n_steps):
        full[step] = pays[step, index, units]
        left[step] = np.where(full[step], 0, lost[step, index, units])
        index = np.where(full[step], 0, np.minimum(index + 1, max_age - 1))
    return full, left


def follow_given(lost: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Lost mass `(steps, units)` of given full steps, bool `(steps, units)`."""
    return follow(lost, np.broadcast_to(full[:, None], lost.shape))[1]
