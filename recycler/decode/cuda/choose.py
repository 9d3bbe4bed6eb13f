"""The new sets of the units that have scored the whole cache: a radix select in three kernels.

The k best of 128,000 scores are found by their bits. `score` turns logits into scores and counts their first eleven
bits, `pick` lists what is above the bits of the k-th best and what shares them, both over chunks of the cache, and
`finish` looks at the rest of the bits of what shares them, a few hundred as a rule, one program per unit. For units
that did not score, none of the three does anything; where no unit did, a launch is all that they cost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recycler.decode.cuda.score import HIGH_BINS
from recycler.decode.cuda.shares import furthest, units_in

# Of ten bits.
_BINS = tl.constexpr(1024)
# Slots whose places are looked up in one go.
_AT_ONCE = tl.constexpr(1024)


@triton.jit
def _bin_of(found, wanted, BINS: tl.constexpr):
    """The bin of the `wanted`-th largest number, and how many of that bin are among the `wanted` largest."""
    at_least = tl.sum(found) - tl.cumsum(found) + found
    digit = tl.sum((at_least >= wanted).to(tl.int32)) - 1
    above = tl.sum(tl.where(tl.arange(0, BINS) > digit, found, 0))
    return digit, wanted - above


@triton.jit(do_not_specialize=["n_units", "n_prompt", "places"])
def pick(
    modes,
    mode,
    cached,
    sizes,
    search,
    n_units,
    n_prompt,
    places,
    KV_HEADS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """List, in each chunk, the tokens whose high bits are above those of the k-th best, and those that share them.

    Args:
        modes: As in `score`.
        mode: The same.
    """
    order = units_in(modes, mode, n_units, UNITS)
    n_chunks = tl.cdiv(furthest(cached, n_units, n_prompt, KV_HEADS, UNITS), CHUNK)
    n_items = tl.max(order) * n_chunks
    share = tl.cdiv(n_items, tl.num_programs(0))
    begin = tl.program_id(0) * share
    # Chunks of a program lie side by side, so that they are few units' whose counts it looks through.
    unit_before, digit = -1, 0
    for item in range(begin, tl.minimum(begin + share, n_items)):
        unit = tl.sum((order <= item // n_chunks).to(tl.int32))
        chunk = item % n_chunks
        first = tl.load(cached.start + unit // KV_HEADS)
        end = n_prompt + tl.load(cached.n_own + unit // KV_HEADS) + 1
        if unit != unit_before:
            wanted = tl.load(sizes + unit % KV_HEADS) - SINKS - WINDOW
            found = tl.load(search.counts + unit * HIGH_BINS + tl.arange(0, HIGH_BINS))
            lowest_bin, _ = _bin_of(found, wanted, HIGH_BINS)
            digit = tl.where(wanted > 0, lowest_bin, HIGH_BINS)
            unit_before = unit
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        ranked = (place >= first + SINKS) & (place < end - WINDOW)
        scores = search.scores + unit.to(tl.int64) * places
        bits = tl.load(scores + place, mask=ranked, other=0).to(tl.int32, bitcast=True)
        above = (ranked & ((bits >> 20) > digit)).to(tl.int32)
        sharing = (ranked & ((bits >> 20) == digit)).to(tl.int32)
        to = search.picked + (unit.to(tl.int64) * CHUNKS + chunk) * CHUNK
        tl.store(to + tl.cumsum(above) - 1, place, mask=above > 0)
        tl.store(to + CHUNK - tl.cumsum(sharing), place, mask=sharing > 0)
        tl.store(search.n_picked + unit * 2 * CHUNKS + chunk, tl.sum(above))
        tl.store(search.n_picked + (unit * 2 + 1) * CHUNKS + chunk, tl.sum(sharing))


@triton.jit
def _nth_picked(upto, picked, n, exists, FROM_END: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Place of the n-th token on a unit's lists, given how many there are up to each chunk."""
    # The first chunk up to which there are more than n, by halving.
    chunk = tl.zeros_like(n)
    for halving in tl.static_range(1, 24):
        if CHUNKS >> halving > 0:
            upto_half = tl.load(upto + chunk + (CHUNKS >> halving) - 1, mask=exists, other=0)
            chunk = tl.where(upto_half <= n, chunk + (CHUNKS >> halving), chunk)
    before = tl.load(upto + chunk - 1, mask=exists & (chunk > 0), other=0)
    in_chunk = n - before
    at = chunk * CHUNK + (CHUNK - 1 - in_chunk if FROM_END else in_chunk)
    return tl.load(picked + at, mask=exists, other=0)


@triton.jit(do_not_specialize=["n_prompt", "places", "stamp"])
def finish(
    modes,
    mode,
    cached,
    sets,
    sizes,
    weights,
    search,
    refresh_mass,
    refresh_overlap,
    stamp,
    n_layers,
    n_prompt,
    places,
    K: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    MEASURES: tl.constexpr,
):
    """Choose a unit's set: sinks, window and the best of the rest; of two equal scores the later token.

    What was searched is used up: counts are 0 afterwards.

    Args:
        modes: As in `score`; program `unit` does nothing in another mode.
        mode: The same.
        refresh_mass: float64 `(units,)`: gets the recovered mass of the new set.
        refresh_overlap: float64 `(units,)`: gets the overlap of the new set with the old one.
        stamp: Number of this layer; with the step it makes a number that no mark has yet.
        n_layers: Of the model.
        MEASURES: Whether the policy wants to know about new sets.
    """
    unit = tl.program_id(0)
    if tl.load(modes + unit) != mode:
        return
    own = tl.load(cached.n_own + unit // KV_HEADS)
    first, end = tl.load(cached.start + unit // KV_HEADS), n_prompt + own + 1
    size = tl.load(sizes + unit % KV_HEADS)
    positions, kept = sets.positions + unit * K, sets.scores + unit * K
    scores = search.scores + unit.to(tl.int64) * places
    counts = search.counts + unit * HIGH_BINS
    picked = search.picked + unit.to(tl.int64) * CHUNKS * CHUNK
    n_picked = search.n_picked + unit * 2 * CHUNKS
    marks = search.marks + unit.to(tl.int64) * places
    mark = own * n_layers + stamp + 1
    if MEASURES:
        n_old = tl.load(sets.filled + unit)
        for low in range(0, n_old, _AT_ONCE):
            slot = low + tl.arange(0, _AT_ONCE)
            old = tl.load(positions + slot, mask=slot < n_old, other=0)
            tl.store(marks + old, mark, mask=slot < n_old)
        # What is overwritten next has been read by all threads, and what they marked can be seen.
        tl.debug_barrier()

    n_new = tl.minimum(size, end - first)
    if end - first <= size:
        for low in range(0, n_new, _AT_ONCE):
            slot = low + tl.arange(0, _AT_ONCE)
            tl.store(positions + slot, first + slot, mask=slot < n_new)
    else:
        wanted = size - SINKS - WINDOW
        _choose(first, end, wanted, scores, picked, n_picked, positions, CHUNK, CHUNKS, SINKS, WINDOW)
    tl.store(counts + tl.arange(0, HIGH_BINS), tl.zeros((HIGH_BINS,), tl.int32))
    tl.debug_barrier()

    mass, n_kept = tl.zeros((), tl.float32), tl.zeros((), tl.int32)
    for low in range(0, n_new, _AT_ONCE):
        slot = low + tl.arange(0, _AT_ONCE)
        chosen = slot < n_new
        place = tl.load(positions + slot, mask=chosen, other=0)
        tl.store(kept + slot, tl.load(scores + place, mask=chosen, other=0), mask=chosen)
        if MEASURES:
            n_kept += tl.sum((chosen & (tl.load(marks + place, mask=chosen, other=0) == mark)).to(tl.int32))
            for member in tl.static_range(GROUP):
                row = unit * GROUP + member
                logit = tl.load(weights.logits + row.to(tl.int64) * places + place, mask=chosen, other=float("-inf"))
                mass += tl.sum(tl.exp(tl.minimum(logit - tl.load(weights.normaliser + row), 0.0))) / GROUP
    tl.store(sets.filled + unit, n_new)
    if MEASURES:
        tl.store(refresh_mass + unit, mass.to(tl.float64))
        tl.store(refresh_overlap + unit, n_kept.to(tl.float64) / n_new.to(tl.float64))


@triton.jit
def _choose(
    first,
    end,
    wanted,
    scores,
    picked,
    n_picked,
    positions,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The places of a set out of more tokens than it holds."""
    slot = tl.arange(0, _AT_ONCE)
    for low in range(0, SINKS, _AT_ONCE):
        tl.store(positions + low + slot, first + low + slot, mask=low + slot < SINKS)
    for low in range(0, WINDOW, _AT_ONCE):
        to = positions + SINKS + wanted + low + slot
        tl.store(to, end - WINDOW + low + slot, mask=low + slot < WINDOW)
    if wanted > 0:
        chunk = tl.arange(0, CHUNKS)
        exists = chunk < tl.cdiv(end, CHUNK)
        n_above = tl.load(n_picked + chunk, mask=exists, other=0)
        n_sharing = tl.load(n_picked + CHUNKS + chunk, mask=exists, other=0)
        tl.debug_barrier()
        tl.store(n_picked + chunk, tl.cumsum(n_above))
        tl.store(n_picked + CHUNKS + chunk, tl.cumsum(n_sharing))
        tl.debug_barrier()
        all_above, all_sharing = tl.sum(n_above), tl.sum(n_sharing)
        for low in range(0, all_above, _AT_ONCE):
            there = low + slot < all_above
            place = _nth_picked(n_picked, picked, low + slot, there, False, CHUNK, CHUNKS)
            tl.store(positions + SINKS + low + slot, place, mask=there)

        # Of those that share the high bits of the last one in, the rest of the bits decide, and then the place.
        missing = wanted - all_above
        upto = n_picked + CHUNKS
        found = tl.zeros((_BINS,), tl.int32)
        for low in range(0, all_sharing, _AT_ONCE):
            there = low + slot < all_sharing
            place = _nth_picked(upto, picked, low + slot, there, True, CHUNK, CHUNKS)
            bits = tl.load(scores + place, mask=there, other=0).to(tl.int32, bitcast=True)
            found += tl.histogram((bits >> 10) & 1023, _BINS, mask=there)
        middle, missing = _bin_of(found, missing, _BINS)
        found = tl.zeros((_BINS,), tl.int32)
        for low in range(0, all_sharing, _AT_ONCE):
            there = low + slot < all_sharing
            place = _nth_picked(upto, picked, low + slot, there, True, CHUNK, CHUNKS)
            bits = tl.load(scores + place, mask=there, other=0).to(tl.int32, bitcast=True)
            found += tl.histogram(bits & 1023, _BINS, mask=there & (((bits >> 10) & 1023) == middle))
        lowest, missing = _bin_of(found, missing, _BINS)
        n_skipped = tl.sum(tl.where(tl.arange(0, _BINS) == lowest, found, 0)) - missing
        threshold = middle * 1024 + lowest
        n_ties, n_taken = tl.zeros((), tl.int32), SINKS + all_above
        for low in range(0, all_sharing, _AT_ONCE):
            there = low + slot < all_sharing
            place = _nth_picked(upto, picked, low + slot, there, True, CHUNK, CHUNKS)
            bits = tl.load(scores + place, mask=there, other=0).to(tl.int32, bitcast=True) & 0xFFFFF
            tie = (there & (bits == threshold)).to(tl.int32)
            late = (tie > 0) & (n_ties + tl.cumsum(tie) > n_skipped)
            taken = (there & ((bits > threshold) | late)).to(tl.int32)
            tl.store(positions + n_taken + tl.cumsum(taken) - 1, place, mask=taken > 0)
            n_ties += tl.sum(tie)
            n_taken += tl.sum(taken)
