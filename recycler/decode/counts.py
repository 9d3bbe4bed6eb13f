"""What units did and read, as it is counted: full steps, keys-only refreshes, tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from policies import PerUnit, StepPolicy
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


class RunningTotals:
    """Adds up what becomes `Totals`.

    Args:
        shape: `(rows, layers, kv_heads)`.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._full_steps, self._keys_only_steps = np.zeros((2, *shape), dtype=np.int64)
        self._tokens_read = np.zeros(shape)
        self._reasons: dict[str, np.ndarray] = {}

    def add(
        self,
        full: np.ndarray,
        keys_only: np.ndarray,
        read: np.ndarray,
        reasons: Mapping[str, np.ndarray],
        layer: int | slice = slice(None),
    ) -> None:
        """Add a step.

        Args:
            full: bool: decisions, of all layers or of one.
            keys_only: bool of the same shape: those of them that were keys-only refreshes.
            read: float64 of the same shape, as in `Totals`.
            reasons: bool of the same shape: what was overruled, by reason.
            layer: Which one, where it is one.
        """
        self._full_steps[:, layer] += full
        self._keys_only_steps[:, layer] += keys_only
        self._tokens_read[:, layer] += read
        for reason, overruled in reasons.items():
            self._reasons.setdefault(reason, np.zeros_like(self._full_steps))[:, layer] += overruled

    def totals(self) -> Totals:
        """What was added so far."""
        return Totals(
            full_steps=self._full_steps.copy(),
            keys_only_steps=self._keys_only_steps.copy(),
            tokens_read=self._tokens_read.copy(),
            reasons={reason: counts.copy() for reason, counts in self._reasons.items()},
        )


def setless_units(policy: StepPolicy, shape: tuple[int, int, int]) -> np.ndarray:
    """The units whose sets nobody ever reads, because they run full steps for ever; like `keys_only_units`."""
    always = _of_rows(policy, shape, lambda one: one.always_full)
    setless: np.ndarray = always & ~keys_only_units(policy, shape)
    return setless


def keys_only_units(policy: StepPolicy, shape: tuple[int, int, int]) -> np.ndarray:
    """The units whose full decisions are keys-only refreshes.

    Args:
        policy: Whose property is asked for; a `PerRow`'s rows are asked one by one.
        shape: `(rows, layers, kv_heads)`.

    Returns:
        bool of this shape.

    Raises:
        ValueError: If the policy is one of other rows.
    """
    return _of_rows(policy, shape, lambda one: one.keys_only)


def _of_rows(policy: StepPolicy, shape: tuple[int, int, int], asked: Callable[[StepPolicy], PerUnit]) -> np.ndarray:
    each = (policy,) * shape[0]
    if isinstance(policy, PerRow):
        policy.check_rows(shape[0])
        each = policy.rows
    return np.stack([np.broadcast_to(np.asarray(asked(one)) == 1, shape[1:]) for one in each])


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


def dense_tokens(start: np.ndarray, n_prompt: int, n_steps: int) -> int:
    """What full attention would have read, in tokens, summed over rows and steps.

    Args:
        start: int64 `(rows,)`: place of each row's first token.
        n_prompt: Tokens in the cache before the first step, padding included.
        n_steps: How many steps, each of which adds a token and reads it too.
    """
    held = n_steps * (2 * n_prompt + n_steps + 1) // 2
    return int((held - n_steps * start).sum())
