"""Finding the threshold at which a policy runs full as often as it may."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from policies import StepPolicy
from tuning.replay.run import replay_full_share
from tuning.replay.trace_batch import TraceBatch


def calibrate(
    traces: TraceBatch,
    policy_at: Callable[[np.ndarray], StepPolicy],
    rates: np.ndarray | float,
    low: float,
    high: float,
    *,
    n_halvings: int = 14,
) -> np.ndarray:
    """Search thresholds, one per unit or one for all, that give units the full share wanted in replay.

    Units are independent of each other, so one replay serves the bisection of all of them.

    Args:
        traces: What to replay.
        policy_at: Policy for a table `(layers, kv_heads)` of thresholds; its full share must not fall as they rise.
        rates: Full share wanted: `(layers, kv_heads)`, or one number for the mean over all units under one threshold.
        low: Threshold at which the full share is at most the wanted.
        high: Threshold at which it is at least the wanted.
        n_halvings: Replays.

    Returns:
        float64 `(layers, kv_heads)`: the highest thresholds found whose full share does not exceed `rates`.
    """
    lows = np.full(traces.units, float(low))
    highs = np.full(traces.units, float(high))
    for _ in range(n_halvings):
        middle = (lows + highs) / 2
        share = replay_full_share(traces, policy_at(middle))
        if isinstance(rates, float):
            share = np.full(traces.units, share.mean())
        fits = share <= rates
        lows = np.where(fits, middle, lows)
        highs = np.where(fits, highs, middle)
    return lows
