"""Which ages of a set a trace records, and what is between two of them.

A set changes by a token per step, which is much of a young set's life and little of an old one's: ages are exact as
long as one of them matters, and then geometric. 1,024 steps take 80 ages instead of 1,024.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from policies.shown import shown

# Steps; there is memory for every age up to the oldest.
_MOST = 2**20
# Every age up to here, and then so many per doubling.
_N_EXACT = 64
_PER_DOUBLING = 4


def recorded_ages(max_age: int) -> tuple[int, ...]:
    """The ages that are recorded when the oldest is `max_age` steps: all up to 64, then four per doubling."""
    ages = list(range(1, min(max_age, _N_EXACT) + 1))
    power = 1
    while (age := round(_N_EXACT * 2 ** (power / _PER_DOUBLING))) < max_age:
        ages.append(age)
        power += 1
    if ages[-1] < max_age:
        ages.append(max_age)
    return tuple(ages)


def check_ages(ages: Sequence[int]) -> None:
    """Refuse ages that do not rise from 1.

    Raises:
        ValueError: If they do not.
    """
    whole = all(isinstance(age, int) and not isinstance(age, bool) and age <= _MOST for age in ages)
    if not ages or not whole or ages[0] != 1 or any(older <= age for age, older in itertools.pairwise(ages)):
        raise ValueError(f"ages must rise from 1 step, as whole numbers, not {shown(list(ages))}")


def last_recorded(ages: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 `(max_age + 1,)`: for each age the index of the oldest recorded one that is not older; 0 for age 0."""
    return np.maximum(np.searchsorted(ages, np.arange(ages[-1] + 1), side="right") - 1, 0)


def at_age(
    values: np.ndarray, ages: np.ndarray, below: np.ndarray, step: np.ndarray, age: np.ndarray, *unit: np.ndarray
) -> np.ndarray:
    """Numbers of an array by age, interpolated in the age where it was not recorded.

    At step t the entry of the first recorded age beyond t + 1 is that of the prompt's set, which is t + 1 steps old.

    Args:
        values: `(steps, ages, ...)`, as in a trace.
        ages: int64 `(ages,)`: recorded.
        below: `last_recorded(ages)`.
        step: int `(n,)`.
        age: int `(n,)`, from 1 to step + 1; older ones than the oldest recorded take its number.
        unit: int `(n,)` for each further axis.

    Returns:
        float64 `(n,)`.
    """
    age = np.minimum(age, ages[-1])
    low = below[age]
    high = np.minimum(low + 1, len(ages) - 1)
    # How old the sets behind both entries really are.
    younger, older = ages[low], np.minimum(ages[high], step + 1)
    found: np.ndarray = values[(step, low, *unit)].astype(np.float64)
    between = age > younger
    share = (age - younger)[between] / (older - younger)[between]
    beyond = values[(step, high, *unit)].astype(np.float64)[between]
    found[between] = found[between] * (1 - share) + beyond * share
    return found


def all_ages(values: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """An array of recorded ages at every age: `(ages, ...)` to float64 `(max_age, ...)`, interpolated in between.

    NaN from the first recorded age on that has NaN.
    """
    every = np.arange(1, ages[-1] + 1)
    below = last_recorded(ages)[1:]
    above = np.minimum(below + 1, len(ages) - 1)
    share = np.where(every > ages[below], (every - ages[below]) / np.maximum(ages[above] - ages[below], 1), 0.0)
    share = share.reshape(-1, *[1] * (values.ndim - 1))
    exact: np.ndarray = values[below].astype(np.float64)
    return np.where(share > 0, exact * (1 - share) + values[above].astype(np.float64) * share, exact)


def mean_by_age(values: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """Mean over the steps that have a set of an age: `(steps, ages, ...)` to float64 `(max_age, ...)`, at every age.

    NaN where no step has one.
    """
    step = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    # Else it is the prompt's set, which is younger.
    of_age = ages.reshape(-1, *[1] * (values.ndim - 2)) <= step + 1
    seen = of_age & ~np.isnan(values)
    count = seen.sum(0)
    total = np.where(seen, values, 0).sum(0, dtype=np.float64)
    return all_ages(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), ages)


def since_prompt(values: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """What is said of the prompt's set at each step: `(steps, ages, ...)` to `(steps, ...)`.

    Where that is older than the oldest recorded age, a set of this age stands in, as in replay.
    """
    step = np.arange(len(values))
    found: np.ndarray = values[step, np.minimum(np.searchsorted(ages, step + 1), len(ages) - 1)]
    return found
