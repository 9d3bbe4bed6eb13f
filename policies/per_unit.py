"""Parameters that are one number, or one number per unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from policies.shown import shown

# In size: beyond, a float64 no longer counts single steps.
_LARGEST = 1e15

# One number for all units, or a (layers, kv_heads) table; policies keep tables as tuples, which hash.
PerUnit = float | Sequence[Sequence[float]]


def as_per_unit(name: str, value: Any, low: float, high: float) -> PerUnit:
    """Check a parameter and make it hashable plain numbers.

    Args:
        name: What to call the parameter in a message.
        value: A number, or a `(layers, kv_heads)` nested sequence or array.
        low: Smallest value allowed.
        high: Largest value allowed.

    Raises:
        ValueError: If the value is neither, is not finite or above 1e15 in size, or lies outside [low, high].
    """
    try:
        table = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        table = np.empty(0)
    if table.ndim not in (0, 2) or table.size == 0 or isinstance(value, (str, bool)):
        raise ValueError(
            f"{name} must be one number, or a table with one row per layer and one column per KV head, "
            f"not {shown(value)}."
        )
    wrong = table[~((table >= low) & (table <= high) & np.isfinite(table))]
    if wrong.size:
        bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise ValueError(f"{name} must be {bounds}, not {wrong[0]:g}.")
    if (largest := table.flat[np.abs(table).argmax()]) and abs(largest) > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST:g} in size, not {largest:g}.")
    if table.ndim == 0:
        return int(value) if isinstance(value, int) else float(table)
    return tuple(tuple(float(number) for number in row) for row in table)


def unit_shape(parameter: Any) -> tuple[int, int] | None:
    """`(layers, kv_heads)` of a per-unit table; None for anything that fits every model."""
    match parameter:
        case ((int() | float(), *_) as row, *_):
            return len(parameter), len(row)
    return None


def numbers(parameter: PerUnit) -> Iterator[float]:
    """All the numbers of a parameter, flat."""
    if isinstance(parameter, (int, float)):
        yield parameter
    else:
        for row in parameter:
            yield from row
