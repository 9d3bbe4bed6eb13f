"""What units did and read, as it is counted: full steps, keys-only refreshes, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from policies import StepPolicy
from recycler.decode.per_row import PerRow


@dataclass(frozen=True)
class Totals:
    """What units did since the prompt, summed over decode steps; arrays are `(rows, layers, kv_heads)`.

    Attributes:
        full_steps: int64: steps that ran full, keys-only refreshes included.
        keys_only_steps: int64: those of them that were keys-only refreshes.
        tokens_read: float64: what was read of the cache, in tokens: keys and values of one token count 1, keys alone
            one half.
        reasons: int64: how often wrappers overruled the policy, by reason.
    """

    full_steps: np.ndarray
    keys_only_steps: np.ndarray
    tokens_read: np.ndarray
    reasons: Mapping[str, np.ndarray]


def keys_only_units(policy: StepPolicy, units: tuple[int, int]) -> np.ndarray:
    """The units whose full decisions are keys-only refreshes.

    Args:
        policy: Whose `keys_only` is asked for; a `PerRow`'s rows are asked one by one.
        units: `(layers, kv_heads)`.

    Returns:
        bool `(rows or 1, layers, kv_heads)`, with one row if all follow one policy.
    """
    each = policy.rows if isinstance(policy, PerRow) else (policy,)
    return np.stack([np.broadcast_to(np.asarray(one.keys_only) != 0, units) for one in each])


def full_counts(full: np.ndarray, keys_only: np.ndarray) -> np.ndarray:
    """What unit-steps count in the full share, float64: 1 for a full step, 1/2 for a keys-only refresh, else 0.

    Args:
        full: bool: decisions.
        keys_only: bool of the same shape: those of them that are keys-only refreshes.
    """
    counts: np.ndarray = full - keys_only / 2
    return counts


def tokens_read(full: np.ndarray, keys_only: np.ndarray, dense: np.ndarray, in_set: np.ndarray) -> np.ndarray:
    """What unit-steps read of the cache, float64, in tokens: keys and values of one token count 1, keys alone one half.

    Args:
        full: bool: decisions.
        keys_only: bool of the same shape: those of them that are keys-only refreshes.
        dense: Tokens in the cache, of a shape that broadcasts to it.
        in_set: Tokens in the units' sets, of the same shape as `full`.
    """
    read: np.ndarray = in_set + full_counts(full, keys_only) * (dense - in_set)
    return read
