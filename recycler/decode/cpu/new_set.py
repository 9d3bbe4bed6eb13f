"""The new set of a unit that has scored all tokens."""

from __future__ import annotations

from numba import njit

from recycler.decode.cpu.arrays import Array, Rules, Scratch, Signals, Units
from recycler.decode.cpu.scalars import exp
from recycler.decode.cpu.sets import choose, group_scores, pool


@njit(error_model="numpy")
def choose_set(
    row: int, head: int, thread: int, start: Array, end: int, units: Units, rules: Rules, scratch: Scratch
) -> None:
    """Choose a unit's set by the logits of its last full step, at which the cache ended at `end`."""
    scores, pooled = scratch.token_score[thread], scratch.pooled[thread]
    group_scores(units.logits[row, head], units.normaliser[row, head], start[row], end, rules.group_mean, scores)
    pool(scores, start[row], end, rules.pool_backward, rules.pool_forward, pooled)
    size, found = units.sizes[head], scratch.found[thread]
    positions, kept = units.positions[row, head, :size], units.scores[row, head, :size]
    units.filled[row, head] = choose(pooled, start[row], end, rules.sinks, rules.window, found, positions, kept)
    units.stale[row, head] = True


@njit(error_model="numpy")
def choose_and_measure(
    row: int,
    head: int,
    thread: int,
    start: Array,
    end: int,
    units: Units,
    signals: Signals,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """The same, and tell `signals` of the new set's mass and of its overlap with the one before."""
    was_in, normaliser = scratch.was_in[thread], units.normaliser[row, head]
    for slot in range(units.filled[row, head]):
        was_in[units.positions[row, head, slot]] = True
    choose_set(row, head, thread, start, end, units, rules, scratch)
    group, filled = units.logits.shape[2], units.filled[row, head]
    mass, n_kept = 0.0, 0
    for slot in range(filled):
        place = units.positions[row, head, slot]
        n_kept += was_in[place]
        for member in range(group):
            mass += exp(min(units.logits[row, head, member, place] - normaliser[member], normaliser.dtype.type(0)))
    for place in range(start[row], end):
        was_in[place] = False
    signals.refresh_mass[row, head] = mass / group
    signals.refresh_overlap[row, head] = n_kept / filled
