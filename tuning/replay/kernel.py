"""Replaying one trace in compiled code: what `tuning.replay.run` does step by step, for a policy that is a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from policies import SIGNALS
from policies.compiled.kernel import PROGRAM_SOURCES, digest_of, helper, stamped_kernel
from policies.compiled.operations import prepare, run

_STEP, _AGE, _N_FULL, _QUERY_SIMILARITY, _STEP_SIMILARITY, _REFRESH_MASS, _REFRESH_OVERLAP, _TOKEN = (
    SIGNALS.index(name)
    for name in (
        "step",
        "age",
        "n_full",
        "query_similarity",
        "step_similarity",
        "refresh_mass",
        "refresh_overlap",
        "token",
    )
)
_N_SIGNALS = len(SIGNALS)
_SOURCES = digest_of((Path(__file__), *PROGRAM_SOURCES))


@helper()
def _at_age(values: Any, ages: Any, last_recorded: Any, step: int, age: int, unit: int) -> float:
    """`traces.ages.at_age` of one number."""
    age = min(age, ages[-1])
    i = last_recorded[age]
    found = np.float64(values[step, i, unit])
    if age == ages[i]:
        return found
    share = (age - ages[i]) / (min(ages[i + 1], step + 1) - ages[i])
    return found * (1 - share) + np.float64(values[step, i + 1, unit]) * share


@stamped_kernel(_SOURCES, nogil=True)
def replay_trace(
    instructions: Any,
    constants: Any,
    tables: Any,
    decision: int,
    ages: Any,
    last_recorded: Any,
    recovered_mass: Any,
    query_similarity: Any,
    wants_query_similarity: bool,
    wants_step_similarity: bool,
    overlap: Any,
    fresh_mass: Any,
    tokens: Any,
    full: Any,
    lost: Any,
) -> int:
    """Run a program along a trace.

    Arrays that are not needed have no steps; signals made of them are NaN.

    Args:
        instructions: As in `PolicyProgram`.
        constants: The same.
        tables: float64 `(n, units)`.
        decision: The instruction that decides.
        ages: int64 `(ages,)`: those that are recorded, in steps.
        last_recorded: int64 `(max_age + 1,)`: see `traces.ages.last_recorded`.
        recovered_mass: float32 `(steps, ages, units)` or empty, as `lost` is.
        query_similarity: float32 `(steps, ages, units)` or empty.
        wants_query_similarity: Whether it is a signal at the age of the set.
        wants_step_similarity: Whether it is one at age 1.
        overlap: The same or empty.
        fresh_mass: float32 `(steps + 1, units)` or empty.
        tokens: float64 `(steps,)`: fed at each step.
        full: bool `(steps, units)`: gets the decisions.
        lost: float32 `(steps, units)`: gets the lost mass; or empty.

    Returns:
        Recycled unit-steps with a set older than the oldest recorded one.
    """
    n_steps, n_units = full.shape
    wants_lost_mass = lost.shape[0] > 0
    signals = np.full((_N_SIGNALS, n_units), np.nan)
    registers = np.empty((instructions.shape[0], n_units))
    prepare(instructions, constants, tables, registers)
    age, n_full = signals[_AGE], signals[_N_FULL]
    age[:] = 1
    n_full[:] = 0
    if fresh_mass.shape[0] > 0:
        signals[_REFRESH_MASS] = fresh_mass[0]
    n_beyond = 0
    for step in range(n_steps):
        signals[_STEP] = step
        signals[_TOKEN] = tokens[step]
        if wants_query_similarity:
            for unit in range(n_units):
                signals[_QUERY_SIMILARITY, unit] = _at_age(
                    query_similarity, ages, last_recorded, step, int(age[unit]), unit
                )
        if wants_step_similarity:
            signals[_STEP_SIMILARITY] = query_similarity[step, 0]
        run(instructions, signals, registers)
        decided = registers[decision]
        for unit in range(n_units):
            old = int(age[unit])
            is_full = decided[unit] != 0
            full[step, unit] = is_full
            if wants_lost_mass:
                lost[step, unit] = 0 if is_full else 1 - _at_age(recovered_mass, ages, last_recorded, step, old, unit)
            if is_full:
                n_full[unit] += 1
                age[unit] = 1
                if fresh_mass.shape[0] > 0:
                    signals[_REFRESH_MASS, unit] = fresh_mass[step + 1, unit]
                if overlap.shape[0] > 0:
                    signals[_REFRESH_OVERLAP, unit] = _at_age(overlap, ages, last_recorded, step, old, unit)
            else:
                n_beyond += age[unit] > ages[-1]
                age[unit] += 1
    return n_beyond
