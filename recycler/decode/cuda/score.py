"""Scores out of logits: of all tokens, for a new set, and of a set's own, for its ranks."""

from __future__ import annotations

import triton
import triton.language as tl

from recycler.decode.cuda.shares import RECYCLED, SKIP, furthest, units_in

# Of the first eleven bits of a float32 that is not negative.
HIGH_BINS = tl.constexpr(2048)
# Bins that are counted together; attention of a chunk rarely spans more than the 32 octaves that these are.
_NEAR_BINS = tl.constexpr(256)
# Slots of a set that are treated in one go.
_AT_ONCE = tl.constexpr(1024)


@triton.jit
def _group_scores(weights, unit, at, there, places, GROUP: tl.constexpr, MEAN: tl.constexpr):
    """Attention of a unit's group to some tokens, one number per token, as `recycler.sets.scores.group_scores`."""
    of_group = tl.zeros_like(at).to(tl.float32)
    # A loop of the kernel, not of its compiler: unrolled, it takes all registers.
    for member in range(GROUP):
        row = unit * GROUP + member
        logit = tl.load(weights.logits + row.to(tl.int64) * places + at, mask=there, other=float("-inf"))
        attention = tl.exp(tl.minimum(logit - tl.load(weights.normaliser + row), 0.0))
        of_group = of_group + attention / GROUP if MEAN else tl.maximum(of_group, attention)
    return of_group


@triton.jit(do_not_specialize=["n_units", "n_prompt", "places"])
def score(
    modes,
    mode,
    cached,
    weights,
    scores,
    unpooled,
    counts,
    n_units,
    n_prompt,
    places,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    BACKWARD: tl.constexpr,
    FORWARD: tl.constexpr,
    EDGE: tl.constexpr,
    MEAN: tl.constexpr,
    VOTED: tl.constexpr,
):
    """Scores of all tokens, as `recycler.sets.scores.token_scores` has them, and how often their high bits occur.

    Counted are tokens that are neither sinks nor in the window.

    A token's attention is computed once, and pooled from memory: by the program that has its chunk, and at the chunk's
    ends by the neighbour too, which writes the same bits.

    Args:
        modes: int8 `(units,)`.
        mode: That of the units to be treated.
        scores: Of `Search`: gets the scores.
        unpooled: float32 `(units, places)`: gets the attention that they are pooled from, where they are.
        counts: Of `Search`: gets the counts.
        EDGE: A power of 2, from BACKWARD and FORWARD on.
        VOTED: Whether `unpooled` holds it already, as a verification left it.
    """
    order = units_in(modes, mode, n_units, UNITS)
    n_chunks = tl.cdiv(furthest(cached, n_units, n_prompt, KV_HEADS, UNITS), CHUNK)
    for item in range(tl.program_id(0), tl.max(order) * n_chunks, tl.num_programs(0)):
        unit = tl.sum((order <= item // n_chunks).to(tl.int32))
        first = tl.load(cached.start + unit // KV_HEADS)
        end = n_prompt + tl.load(cached.n_own + unit // KV_HEADS) + 1
        place = (item % n_chunks) * CHUNK + tl.arange(0, CHUNK)
        exists = (place >= first) & (place < end)
        mine = unpooled + unit.to(tl.int64) * places
        if VOTED:
            pooled = tl.load(mine + place, mask=exists, other=0)
        else:
            pooled = _group_scores(weights, unit, place, exists, places, GROUP, MEAN)
        if BACKWARD + FORWARD > 0:
            if not VOTED:
                tl.store(mine + place, pooled, mask=exists)
                # EDGE places on either side of the chunk, in one go.
                at = tl.arange(0, 2 * EDGE)
                edge = (item % n_chunks) * CHUNK + tl.where(at < EDGE, at - EDGE, CHUNK + at - EDGE)
                beside = (edge >= first) & (edge < end)
                tl.store(mine + edge, _group_scores(weights, unit, edge, beside, places, GROUP, MEAN), mask=beside)
                # All threads have written before one reads.
                tl.debug_barrier()
            for shift in range(-FORWARD, BACKWARD + 1):
                near = place + shift
                there = exists & (near >= first) & (near < end)
                pooled = tl.maximum(pooled, tl.load(mine + near, mask=there, other=0))
        tl.store(scores + unit.to(tl.int64) * places + place, pooled, mask=exists)
        ranked = (place >= first + SINKS) & (place < end - WINDOW)
        # A sign, which a NaN may have, is no bin's.
        bins = (pooled.to(tl.int32, bitcast=True) >> 20) & (HIGH_BINS - 1)
        highest = tl.max(tl.where(ranked, bins, 0))
        below = highest - bins
        is_near = ranked & (below < _NEAR_BINS)
        # What it takes grows with the bins: 256 below the chunk's highest, and the few further ones one by one.
        found = tl.histogram(tl.where(is_near, below, 0), _NEAR_BINS, mask=is_near)
        to = counts + unit * HIGH_BINS
        tl.atomic_add(to + highest - tl.arange(0, _NEAR_BINS), found, mask=found > 0, sem="relaxed")
        tl.atomic_add(to + bins, 1, mask=ranked & (below >= _NEAR_BINS), sem="relaxed")


@triton.jit(do_not_specialize=["places"])
def rank_anew(
    modes,
    modes_before,
    sets,
    weights,
    places,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    SCORE_KEPT: tl.constexpr,
):
    """Let the attention of a recycled step rank the set that it attended to; program `unit`.

    Args:
        modes: int8 `(units,)` of the walk, which left its logits by slot.
        modes_before: int8 `(units,)` of the walk before: units with a new set, which keeps the scores that chose it.
        SCORE_KEPT: Share of its score that a token keeps.
    """
    unit = tl.program_id(0)
    if (tl.load(modes + unit) == RECYCLED) & (tl.load(modes_before + unit) == SKIP):
        n_tokens = tl.load(sets.filled + unit)
        for low in range(0, n_tokens, _AT_ONCE):
            slot = low + tl.arange(0, _AT_ONCE)
            there = slot < n_tokens
            of_group = _group_scores(weights, unit, slot, there, places, GROUP, MEAN)
            to = sets.scores + unit * K + slot
            if SCORE_KEPT > 0:
                of_group += SCORE_KEPT * tl.load(to, mask=there, other=0)
            tl.store(to, of_group, mask=there)
