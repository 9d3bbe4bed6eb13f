"""Choosing a unit's set and keeping it up to date: what `recycler.sets.recycled_set` does, for one unit at a time.

A set is `n` places in `positions[:n]` with their `scores`, in no order; its keys and values lie in the same slots of
two compact arrays, unless it is *stale*: chosen, and not yet copied out of the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.compiled.kernel import helper
from recycler.decode.cpu.arrays import REFRESH_MASS, REFRESH_OVERLAP, Array, Rules, Scratch, Units
from recycler.decode.cpu.scalars import bits_of, exp

_UNSCORED = np.float32(np.inf)


@helper(fastmath=True)
def group_scores(logits: Any, normaliser: Any, begin: int, end: int, mean: bool, scores: Any) -> None:
    """Attention of a group, one number per token: `recycler.sets.scores.group_scores` of logits.

    Args:
        logits: Float `(group, tokens)`, scaled.
        normaliser: Float `(group,)`: log of the sum of their exponentials.
        begin: First token.
        end: One past the last.
        mean: Pool by the mean, not the maximum.
        scores: Float32 `(tokens,)`: the result at `begin ... end - 1`.
    """
    group, n = logits.shape[0], end - begin
    zero = logits.dtype.type(0)
    # Slices, not `range(begin, end)`: for indices that may be negative numba adds checks, and nothing vectorises.
    out = scores[begin:end]
    for head in range(group):
        row, top = logits[head, begin:end], normaliser[head]
        if mean:
            for j in range(n):
                attention = np.float32(exp(min(row[j] - top, zero)) / group)
                out[j] = attention if head == 0 else out[j] + attention
        else:
            for j in range(n):
                attention = np.float32(exp(min(row[j] - top, zero)))
                out[j] = attention if head == 0 else max(out[j], attention)


@helper(fastmath=True)
def pool(scores: Any, begin: int, end: int, backward: int, forward: int, pooled: Any) -> None:
    """The best score of each token's surroundings, as `Selection` has them."""
    n = end - begin
    own, out = scores[begin:end], pooled[begin:end]
    for j in range(n):
        out[j] = own[j]
    for shift in range(1, forward + 1):
        later = out[shift:]
        for j in range(n - shift):
            later[j] = max(later[j], own[j])
    for shift in range(1, backward + 1):
        later = own[shift:]
        for j in range(n - shift):
            out[j] = max(out[j], later[j])


@helper()
def choose(scores: Any, start: int, end: int, sinks: int, window: int, found: Any, positions: Any, kept: Any) -> int:
    """Choose a set: sinks, window, and the best of the rest; of two equal scores the later token.

    Args:
        scores: Float32 `(tokens,)`, at least 0.
        start: First token.
        end: One past the last.
        sinks: First tokens, always taken.
        window: Last tokens, always taken.
        found: int64 `(tokens,)`, for intermediate results.
        positions: `(k,)`: gets the places, in rising order.
        kept: `(k,)`: gets their scores.

    Returns:
        Tokens in the set.
    """
    k = positions.shape[0]
    first, last = min(start + sinks, end), max(end - window, start)
    n_found = 0
    if end - start <= k:
        first = last = end
    else:
        n_found = _largest(scores, first, last, k - sinks - window, found)
    n = 0
    for j in range(start, first):
        positions[n], kept[n] = j, scores[j]
        n += 1
    for i in range(n_found):
        positions[n], kept[n] = found[i], scores[found[i]]
        n += 1
    for j in range(last, end):
        positions[n], kept[n] = j, scores[j]
        n += 1
    return n


@helper()
def _largest(scores: Any, first: int, last: int, wanted: int, found: Any) -> int:
    """Places of the `wanted` largest scores, in rising order, in `found`.

    A radix select: the bits of the smallest of them are found from the top, eleven, ten and ten, by counting. After the
    first count only the tokens that may still be among them are looked at.
    """
    if wanted == 0:
        return 0
    counts = np.zeros(2048, dtype=np.int32)
    for j in range(first, last):
        counts[bits_of(scores[j]) >> 20] += 1
    digit, missing = 2047, wanted
    while counts[digit] < missing:
        missing -= counts[digit]
        digit -= 1
    lowest = np.int32(digit << 20)
    n = 0
    for j in range(first, last):
        if bits_of(scores[j]) >= lowest:
            found[n] = j
            n += 1
    for shift in (10, 0):
        counts[:1024] = 0
        for i in range(n):
            bits = bits_of(scores[found[i]])
            if bits >> (shift + 10) == lowest >> (shift + 10):
                counts[(bits >> shift) & 1023] += 1
        digit = 1023
        while counts[digit] < missing:
            missing -= counts[digit]
            digit -= 1
        lowest |= np.int32(digit << shift)
    # Of those that equal the lowest, the last `missing` are in.
    skipped = counts[lowest & 1023] - missing
    n_kept = 0
    for i in range(n):
        bits = bits_of(scores[found[i]])
        if bits == lowest and skipped > 0:
            skipped -= 1
        elif bits >= lowest:
            found[n_kept] = found[i]
            n_kept += 1
    return n_kept


@helper()
def admit(position: int, start: int, sinks: int, window: int, n: int, positions: Any, scores: Any) -> int:
    """Take the newest token into a set; a full one loses the lowest ranked token that is neither sink nor window.

    Returns:
        The slot that it took.
    """
    slot = n
    if n == positions.shape[0]:
        lowest = np.iinfo(np.int64).max
        for candidate in range(n):
            place = positions[candidate]
            if place >= start + sinks and place <= position - window:
                rank = (np.int64(bits_of(scores[candidate])) << 32) | place
                if rank < lowest:
                    lowest, slot = rank, candidate
    positions[slot] = position
    scores[slot] = _UNSCORED
    return slot


@helper()
def choose_set(
    row: int, head: int, thread: int, start: Array, end: int, units: Units, rules: Rules, scratch: Scratch
) -> None:
    """Choose a unit's set by its logits of this step, at which the cache ends at `end`."""
    scores, unit = scratch.token_score[thread], row * units.filled.shape[1] + head
    group_scores(scratch.logits[unit], scratch.normaliser[unit], start[row], end, rules.group_mean, scores)
    choose_by_scores(row, head, thread, scores, start[row], end, units, rules, scratch)


@helper()
def choose_by_scores(
    row: int,
    head: int,
    thread: int,
    scores: Array,
    begin: int,
    end: int,
    units: Units,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """Choose a unit's set by one number per token, `scores[begin:end]`."""
    pooled = scratch.pooled[thread]
    pool(scores, begin, end, rules.pool_backward, rules.pool_forward, pooled)
    size, found = units.sizes[head], scratch.found[thread]
    positions, kept = units.positions[row, head, :size], units.scores[row, head, :size]
    units.filled[row, head] = choose(pooled, begin, end, rules.sinks, rules.window, found, positions, kept)
    units.stale[row, head] = True


@helper()
def mark_set(row: int, head: int, thread: int, units: Units, scratch: Scratch) -> None:
    """Note the tokens of a unit's set before another is chosen, for `measure_set`."""
    for slot in range(units.filled[row, head]):
        scratch.was_in[thread, units.positions[row, head, slot]] = True


@helper()
def measure_set(
    row: int, head: int, thread: int, start: Array, end: int, units: Units, signals: Array, scratch: Scratch
) -> None:
    """Tell `signals` of a new set's mass and of its overlap with the marked one, and take the marks away."""
    unit = row * units.filled.shape[1] + head
    was_in, logits, normaliser = scratch.was_in[thread], scratch.logits[unit], scratch.normaliser[unit]
    group, filled = logits.shape[0], units.filled[row, head]
    mass, n_kept = 0.0, 0
    for slot in range(filled):
        place = units.positions[row, head, slot]
        n_kept += was_in[place]
        for member in range(group):
            mass += exp(min(logits[member, place] - normaliser[member], normaliser.dtype.type(0)))
    for place in range(start[row], end):
        was_in[place] = False
    signals[row, REFRESH_MASS, head] = mass / group
    signals[row, REFRESH_OVERLAP, head] = n_kept / filled
