"""Ageing sets in compiled code: what `recycler.record.aged_sets.age_together` does an age at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import prange

from policies.compiled import kernel
from policies.compiled.kernel import digest_of, helper, stamped_kernel

_SOURCES = digest_of([Path(__file__), Path(kernel.__file__)])
# Sets that are aged side by side.
_AT_ONCE = 32


@helper()
def _admit(place: int, sinks: int, window: int, filled: int, positions: Any, scores: Any) -> int:
    """Take in the token that has just arrived; of a full set the lowest ranked leaves. The slot that it took."""
    slot = filled
    if filled == positions.shape[0]:
        last, bits = place - window, scores.view(np.int32)
        lowest = np.iinfo(np.int64).max
        # Without a branch, so that it is done for several slots at once. The bits of a float that is not negative sort
        # as the float does.
        for candidate in range(filled):
            at = positions[candidate]
            rank = (np.int64(bits[candidate]) << 32) | at
            lowest = min(lowest, rank if (at >= sinks) & (at <= last) else np.iinfo(np.int64).max)
        leaves = np.int32(lowest & 0xFFFFFFFF)
        slot = 0
        while positions[slot] != leaves:
            slot += 1
    positions[slot] = place
    return slot


@helper(fastmath={"reassoc"})
def _over_set(weights: Any, positions: Any, smallest: float, over_set: Any, scales: Any) -> float:
    """Weights `(group, tokens)` at the places of a set, `(group, k)`, and what scales each sum to 1; their sum."""
    mass = 0.0
    for query_head in range(weights.shape[0]):
        total = weights.dtype.type(0)
        for j in range(positions.shape[0]):
            weight = weights[query_head, positions[j]]
            over_set[query_head, j] = weight
            total += weight
        mass += total
        # A head that attends to nothing in the set, as far as its precision tells, scores nothing.
        scales[query_head] = 1 / max(total, smallest)
    return mass


@helper()
def _rank_anew(over_set: Any, scales: Any, filled: int, score_kept: Any, group_mean: bool, scores: Any) -> None:
    """Let a step's attention over a set `(group, k)` rank it."""
    group = over_set.shape[0]
    if group_mean:
        for j in range(filled):
            latest = over_set[0, j] * scales[0]
            for query_head in range(1, group):
                latest += over_set[query_head, j] * scales[query_head]
            scores[j] = scores[j] * score_kept + np.float32(latest / group)
        return
    latest = over_set[0]
    for j in range(filled):
        latest[j] *= scales[0]
    for query_head in range(1, group):
        for j in range(filled):
            latest[j] = max(latest[j], over_set[query_head, j] * scales[query_head])
    for j in range(filled):
        scores[j] = scores[j] * score_kept + np.float32(latest[j])


@stamped_kernel(_SOURCES, parallel=True)
def age_each(
    probabilities: Any,
    chosen: Any,
    chosen_scores: Any,
    sizes: Any,
    first: int,
    sinks: int,
    window: int,
    score_kept: float,
    group_mean: bool,
    ages: Any,
    last_recorded: Any,
    apart: int,
    recovered_mass: Any,
    overlap: Any,
) -> None:
    """Age sets one by one.

    Args:
        probabilities: Float `(heads, group, rows, tokens)`.
        chosen: int64 `(heads, rows, k)`: places, -1 in empty slots.
        chosen_scores: float32 of the same shape.
        sizes: int64 `(heads,)`: slots that each set may use, the first ones.
        first: Place of row 0.
        sinks: As in the selection.
        window: The same.
        score_kept: Share of its score that a token keeps from step to step; below 0 where scores stay as chosen.
        group_mean: Whether scores are means over query heads, not maxima.
        ages: int64 `(ages,)`: which to look at.
        last_recorded: int64 `(max_age + 1,)`: see `traces.ages.last_recorded`.
        apart: Only sets of every so many rows are aged, beginning with row 0.
        recovered_mass: Float `(heads, rows, ages)`: gets the mass, before it is clipped.
        overlap: The same: gets the overlap.
    """
    heads, group, rows, tokens = probabilities.shape
    is_fresh = np.zeros((heads, rows, tokens), dtype=np.bool_)
    n_fresh = np.zeros((heads, rows), dtype=np.int64)
    for at in prange(heads * rows):
        head, row = at // rows, at % rows
        for slot in range(sizes[head]):
            if chosen[head, row, slot] >= 0:
                is_fresh[head, row, chosen[head, row, slot]] = True
                n_fresh[head, row] += 1
    # A piece is as many sets as fit into the first cache; old sources, which have more ages to go through than young
    # ones, and young ones are dealt out evenly.
    n_pieces = -(-rows // (_AT_ONCE * apart))
    smallest = np.finfo(probabilities.dtype).tiny
    for piece in prange(heads * n_pieces):
        head, first_source, between = piece // n_pieces, piece % n_pieces * apart, n_pieces * apart
        size = sizes[head]
        positions = chosen[head, first_source::between, :size].astype(np.int32)
        scores = chosen_scores[head, first_source::between, :size].copy()
        filled = np.zeros(positions.shape[0], dtype=np.int64)
        for i in range(positions.shape[0]):
            for slot in range(size):
                if positions[i, slot] >= 0:
                    positions[i, filled[i]], scores[i, filled[i]] = positions[i, slot], scores[i, slot]
                    filled[i] += 1
        over_set = np.empty((group, size), dtype=probabilities.dtype)
        scales = np.empty(group, dtype=probabilities.dtype)
        # Row by row: what a row attends to is looked at for all sets together.
        for row in range(first_source + 1, rows):
            for i in range(positions.shape[0]):
                source = first_source + i * between
                age = row - source
                if age < 1:
                    break
                if age > ages[-1]:
                    continue
                slot = _admit(first + row, sinks, window, filled[i], positions[i], scores[i])
                scores[i, slot] = np.float32(np.inf) if score_kept < 0 else np.float32(0)
                filled[i] = max(filled[i], slot + 1)
                column = last_recorded[age]
                if age != ages[column]:
                    # Of this age the prompt's set alone is looked at.
                    column = column + 1 if source == 0 else -1
                if column >= 0 or score_kept >= 0:
                    here = positions[i, : filled[i]]
                    mass = _over_set(probabilities[head, :, row], here, smallest, over_set, scales)
                if column >= 0:
                    n_held = 0
                    for j in range(filled[i]):
                        n_held += is_fresh[head, row, positions[i, j]]
                    recovered_mass[head, row, column] = mass / group
                    overlap[head, row, column] = n_held / n_fresh[head, row]
                if score_kept >= 0:
                    _rank_anew(over_set, scales, filled[i], np.float32(score_kept), group_mean, scores[i])
