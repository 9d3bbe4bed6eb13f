"""The attention of a layer's units, over their caches or their sets, and what becomes of the sets."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from recycler.decode.cpu.arrays import Array, Cache, Rules, Scratch, Signals, Units
from recycler.decode.cpu.attention import NOTHING, attend_tokens, merge, score_tokens
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.sets import admit, choose_and_measure, choose_set, group_scores


@kernel(parallel=True, fastmath={"contract"})
def attend(
    full: Array,
    scaling: float,
    start: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    signals: Signals,
    rules: Rules,
    scratch: Scratch,
    n_threads: int,
) -> None:
    """Attention of a step, full for some units and over their sets for the others; and what becomes of the sets.

    A unit that runs full leaves its logits behind. Its set is chosen from them when it next runs recycled, and copied
    out of the cache while it is first attended to; a unit that runs full again never pays for a set that it does not
    use. If the policy wants to know about new sets, they are chosen at once. To a unit that `refresh_keys` has brought
    a new set at this step, it is recycled, and nothing happens to that set but its being copied.

    Args:
        full: bool `(rows, kv_heads)`: units that attend to the whole cache.
        scaling: Factor on query x key.
        start: int64 `(rows,)`: place of each row's first token.
        cache: Of the layer.
        n_own: Own tokens in it, this step's included.
        units: State of the layer; brought up to date.
        signals: Gets the measures of new sets.
        rules: The selection.
        scratch: Holds the queries; gets the attention in `attended`.
        n_threads: Threads to use.
    """
    rows, kv_heads = full.shape
    n_units = rows * kv_heads
    for thread in prange(n_threads):
        for unit in range(thread, n_units, n_threads):
            _admit(unit, thread, full, start, cache, n_own, units, rules, scratch)
    for thread in prange(n_threads):
        _attend_share(thread, n_threads, full, scaling, start, cache, n_own, units, rules, scratch)
    end = cache.prompt_key.shape[2] + n_own
    for thread in prange(n_threads):
        for unit in range(thread, n_units, n_threads):
            _settle(unit, thread, n_threads, full, start, end, units, signals, rules, scratch)


@njit(error_model="numpy")
def _admit(
    unit: int,
    thread: int,
    full: Array,
    start: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """Choose the set of a unit that needs one now, and take the newest token into it."""
    kv_heads = full.shape[1]
    row, head = unit // kv_heads, unit % kv_heads
    end = cache.prompt_key.shape[2] + n_own
    if units.fresh[row, head]:
        return
    if units.pending[row, head] > 0:
        if full[row, head]:
            return
        choose_set(row, head, thread, start, units.pending[row, head], units, rules, scratch)
        units.pending[row, head] = 0
    filled = units.filled[row, head]
    size = units.sizes[head]
    positions, scores = units.positions[row, head, :size], units.scores[row, head, :size]
    slot = admit(end - 1, start[row], rules.sinks, rules.window, filled, positions, scores)
    if rules.accumulated_ranking:
        scores[slot] = 0
    units.filled[row, head] = max(filled, slot + 1)
    if not units.stale[row, head]:
        _copy(cache.own_key[row, head], n_own - 1, units.set_key[row, head], slot)
        _copy(cache.own_value[row, head], n_own - 1, units.set_value[row, head], slot)


@njit(error_model="numpy")
def _copy(source: Array, i: int, target: Array, j: int) -> None:
    for d in range(source.shape[1]):
        target[j, d] = source[i, d]


@njit(error_model="numpy", fastmath=True)
def _attend_share(
    thread: int,
    n_threads: int,
    full: Array,
    scaling: float,
    start: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """A thread's share: tokens of all units laid end to end, cut into equal parts."""
    rows, kv_heads = full.shape
    n_prompt = cache.prompt_key.shape[2]
    end = n_prompt + n_own
    n_tokens = 0
    for row in range(rows):
        for head in range(kv_heads):
            n_tokens += end - start[row] if full[row, head] else units.filled[row, head]
    low, high = thread * n_tokens // n_threads, (thread + 1) * n_tokens // n_threads
    for unit in range(rows * kv_heads):
        row, head = unit // kv_heads, unit % kv_heads
        shared = row % cache.prompt_key.shape[0]
        runs_full = full[row, head]
        n = end - start[row] if runs_full else units.filled[row, head]
        first, last = max(low, 0), min(high, n)
        low, high = low - n, high - n
        _nothing_yet(scratch.highest[thread, unit], scratch.total[thread, unit], scratch.partial[thread, unit])
        if first >= last:
            continue
        keys, values = units.set_key[row, head], units.set_value[row, head]
        logits, shift = scratch.set_logits[unit], 0
        if runs_full:
            keys, values = cache.prompt_key[shared, head], cache.prompt_value[shared, head]
            logits, first, last = units.logits[row, head], first + start[row], last + start[row]
        elif units.stale[row, head]:
            _copy_set(first, last, row, head, shared, cache, units)
        # A unit that runs full goes on from the prompt's part of the cache to the row's own.
        for part in range(2 if runs_full else 1):
            begin, stop = first, last
            if part == 1:
                keys, values, shift = cache.own_key[row, head], cache.own_value[row, head], n_prompt
                begin, stop = max(first - n_prompt, 0), last - n_prompt
            elif runs_full:
                stop = min(last, n_prompt)
            attend_tokens(
                scratch.query[row, head],
                keys,
                values,
                begin,
                stop,
                scaling,
                scratch.block[thread],
                scratch.highest[thread, unit],
                scratch.total[thread, unit],
                scratch.partial[thread, unit],
                logits,
                shift,
                runs_full or rules.updated_ranking or rules.accumulated_ranking,
            )


@njit(error_model="numpy")
def _nothing_yet(highest: Array, total: Array, partial: Array) -> None:
    for head in range(partial.shape[0]):
        highest[head], total[head] = NOTHING, 0
        for d in range(partial.shape[1]):
            partial[head, d] = 0


@njit(error_model="numpy")
def _copy_set(first: int, last: int, row: int, head: int, shared: int, cache: Cache, units: Units) -> None:
    """Copy some slots of a unit's set out of the cache."""
    n_prompt = cache.prompt_key.shape[2]
    key, value = units.set_key[row, head], units.set_value[row, head]
    for slot in range(first, last):
        place = units.positions[row, head, slot]
        if place < n_prompt:
            _copy(cache.prompt_key[shared, head], place, key, slot)
            _copy(cache.prompt_value[shared, head], place, value, slot)
        else:
            _copy(cache.own_key[row, head], place - n_prompt, key, slot)
            _copy(cache.own_value[row, head], place - n_prompt, value, slot)


@njit(error_model="numpy")
def _settle(
    unit: int,
    thread: int,
    n_threads: int,
    full: Array,
    start: Array,
    end: int,
    units: Units,
    signals: Signals,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """Bring the threads' parts together, and end the step for a unit."""
    kv_heads = full.shape[1]
    row, head = unit // kv_heads, unit % kv_heads
    group, head_dim = scratch.query.shape[2], scratch.query.shape[3]
    for d in range(head_dim):
        units.last_query[row, head, d] = scratch.unit_query[row, head, d]
    # A recycled step must not touch the normaliser of the last full one, which a choice put off still needs.
    of_set = np.empty(group, dtype=units.normaliser.dtype)
    normaliser = units.normaliser[row, head] if full[row, head] else of_set
    merge(
        scratch.highest[:n_threads, unit],
        scratch.total[:n_threads, unit],
        scratch.partial[:n_threads, unit],
        scratch.attended[row, head],
        normaliser,
    )
    if not full[row, head]:
        units.stale[row, head] = False
        if units.fresh[row, head]:
            units.fresh[row, head] = False
        elif rules.updated_ranking:
            logits, scores = scratch.set_logits[unit], units.scores[row, head]
            group_scores(logits, normaliser, 0, units.filled[row, head], rules.group_mean, scores)
        elif rules.accumulated_ranking:
            logits, latest = scratch.set_logits[unit], scratch.token_score[thread]
            group_scores(logits, normaliser, 0, units.filled[row, head], rules.group_mean, latest)
            for slot in range(units.filled[row, head]):
                units.scores[row, head, slot] += latest[slot]
        return
    for d in range(head_dim):
        units.full_query[row, head, d] = scratch.unit_query[row, head, d]
    if rules.wants_refresh:
        choose_and_measure(row, head, thread, start, end, units, signals, rules, scratch)
    else:
        units.pending[row, head] = end


@kernel(parallel=True, fastmath={"contract"})
def refresh_keys(
    refreshed: Array,
    scaling: float,
    start: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    signals: Signals,
    rules: Rules,
    scratch: Scratch,
    n_threads: int,
) -> None:
    """Score all tokens for some units and choose their sets, for `attend` to attend to.

    Args:
        refreshed: bool `(rows, kv_heads)`: which units.
        scaling: Factor on query x key.
        start: int64 `(rows,)`: place of each row's first token.
        cache: Of the layer; its keys are read.
        n_own: Own tokens in it, this step's included.
        units: State of the layer; gets the sets.
        signals: Gets the measures of new sets.
        rules: The selection.
        scratch: Holds the queries.
        n_threads: Threads to use.
    """
    rows, kv_heads = refreshed.shape
    for thread in prange(n_threads):
        _score_share(thread, n_threads, refreshed, scaling, start, cache, n_own, units, scratch)
    end = cache.prompt_key.shape[2] + n_own
    for thread in prange(n_threads):
        nth = 0
        for unit in range(rows * kv_heads):
            if refreshed[unit // kv_heads, unit % kv_heads]:
                if nth % n_threads == thread:
                    _refresh(unit, thread, n_threads, kv_heads, start, end, units, signals, rules, scratch)
                nth += 1


@njit(error_model="numpy", fastmath=True)
def _score_share(
    thread: int,
    n_threads: int,
    refreshed: Array,
    scaling: float,
    start: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    scratch: Scratch,
) -> None:
    """A thread's share: the caches of all these units laid end to end, cut into equal parts."""
    rows, kv_heads = refreshed.shape
    n_prompt = cache.prompt_key.shape[2]
    end = n_prompt + n_own
    n_tokens = 0
    for row in range(rows):
        for head in range(kv_heads):
            n_tokens += end - start[row] if refreshed[row, head] else 0
    low, high = thread * n_tokens // n_threads, (thread + 1) * n_tokens // n_threads
    for unit in range(rows * kv_heads):
        row, head = unit // kv_heads, unit % kv_heads
        if not refreshed[row, head]:
            continue
        highest, total = scratch.highest[thread, unit], scratch.total[thread, unit]
        for member in range(highest.shape[0]):
            highest[member], total[member] = NOTHING, 0
        n = end - start[row]
        first, last = max(low, 0) + start[row], min(high, n) + start[row]
        low, high = low - n, high - n
        keys, shift = cache.prompt_key[row % cache.prompt_key.shape[0], head], 0
        for part in range(2):
            begin, stop = first, min(last, n_prompt)
            if part == 1:
                keys, shift = cache.own_key[row, head], n_prompt
                begin, stop = max(first - n_prompt, 0), last - n_prompt
            score_tokens(
                scratch.query[row, head],
                keys,
                begin,
                stop,
                scaling,
                scratch.block[thread],
                highest,
                total,
                units.logits[row, head],
                shift,
            )


@njit(error_model="numpy")
def _refresh(
    unit: int,
    thread: int,
    n_threads: int,
    kv_heads: int,
    start: Array,
    end: int,
    units: Units,
    signals: Signals,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """Bring the threads' parts together, and choose a unit's set."""
    row, head = unit // kv_heads, unit % kv_heads
    merge(
        scratch.highest[:n_threads, unit],
        scratch.total[:n_threads, unit],
        scratch.partial[:n_threads, unit, :, :0],
        scratch.attended[row, head, :, :0],
        units.normaliser[row, head],
    )
    units.full_query[row, head] = scratch.unit_query[row, head]
    units.fresh[row, head] = True
    if rules.wants_refresh:
        # Its overlap is with the old set as it would be at this step.
        filled, size = units.filled[row, head], units.sizes[head]
        positions, scores = units.positions[row, head, :size], units.scores[row, head, :size]
        slot = admit(end - 1, start[row], rules.sinks, rules.window, filled, positions, scores)
        units.filled[row, head] = max(filled, slot + 1)
        choose_and_measure(row, head, thread, start, end, units, signals, rules, scratch)
    else:
        choose_set(row, head, thread, start, end, units, rules, scratch)
