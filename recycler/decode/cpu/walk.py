"""The attention of a layer's units, over their caches or their sets, and what becomes of the sets."""

from __future__ import annotations

import numpy as np
from numba import prange

from policies.compiled.kernel import helper
from recycler.decode.cpu.arrays import Array, Cache, Products, Rules, Scratch, Units
from recycler.decode.cpu.attention import NOTHING, attend_tokens, leave_to_sinks, merge
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.sets import admit, choose_set, group_scores, mark_set, measure_set
from recycler.decode.modes import FULL, KEYS_ONLY, RECYCLED, SKIP

# Turns of a step: refreshes by keys alone, then the attention.
_REFRESH, _ATTEND = 0, 1


@kernel(parallel=True, fastmath={"contract"})
def attend(
    full: Array,
    products: Products,
    start: Array,
    cache: Cache,
    n_own: Array,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
    n_threads: int,
) -> None:
    """Attention of a step, full for some units and over their sets for the others; and what becomes of the sets.

    Units that refresh by their keys alone score the cache and choose their sets first; to the attention they are
    recycled. A unit that runs full chooses its set after the attention. A set is copied out of the cache while it is
    first attended to.

    Args:
        full: bool `(rows, kv_heads)`: units that decided for a full step.
        products: What becomes of query x key.
        start: int64 `(rows,)`: place of each row's first token.
        cache: Of the layer.
        n_own: int64 `(rows,)`: own tokens in it, this step's included; 0 for rows that take no part in this step.
        units: State of the layer; brought up to date.
        signals: Of the layer; gets the measures of new sets.
        rules: The selection.
        scratch: Holds the queries; gets the attention in `attended`.
        n_threads: Threads to use.
    """
    first_turn = _begin(full, start, cache, n_own, units, rules, scratch)
    for turn in range(first_turn, _ATTEND + 1):
        for thread in prange(n_threads):
            _walk_share(np.int64(thread), n_threads, turn, products, start, cache, n_own, units, rules, scratch)
        for thread in prange(n_threads):
            _settle_share(
                np.int64(thread), n_threads, turn, products, start, cache, n_own, units, signals, rules, scratch
            )


@helper()
def _begin(full: Array, start: Array, cache: Cache, n_own: Array, units: Units, rules: Rules, scratch: Scratch) -> int:
    """Write down what each unit does, and take the newest token into its set; the first turn that there is."""
    rows, kv_heads = full.shape
    first_turn = _ATTEND
    for row in range(rows):
        own = n_own[row] - 1
        place = cache.prompt_key.shape[2] + own
        for head in range(kv_heads):
            scratch.modes[_REFRESH, row, head] = SKIP
            if own < 0:
                scratch.modes[_ATTEND, row, head] = SKIP
                continue
            scratch.modes[_ATTEND, row, head] = FULL if full[row, head] else RECYCLED
            if full[row, head] and units.by_keys[row, head]:
                scratch.modes[_REFRESH, row, head], scratch.modes[_ATTEND, row, head] = KEYS_ONLY, RECYCLED
                first_turn = _REFRESH
            if units.setless[row, head]:
                continue
            filled, size = units.filled[row, head], units.sizes[head]
            positions, scores = units.positions[row, head, :size], units.scores[row, head, :size]
            slot = admit(place, start[row], rules.sinks, rules.window, filled, positions, scores)
            if rules.score_kept >= 0:
                scores[slot] = 0
            units.filled[row, head] = max(filled, slot + 1)
            if not units.stale[row, head]:
                _copy(cache.own_key[row, head], own, units.set_key[row, head], slot)
                _copy(cache.own_value[row, head], own, units.set_value[row, head], slot)
    return first_turn


@helper()
def _copy(source: Array, i: int, target: Array, j: int) -> None:
    for d in range(source.shape[1]):
        target[j, d] = source[i, d]


@helper(fastmath=True)
def _walk_share(
    thread: int,
    n_threads: int,
    turn: int,
    products: Products,
    start: Array,
    cache: Cache,
    n_own: Array,
    units: Units,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """A thread's share: tokens of all units laid end to end, cut into equal parts."""
    modes = scratch.modes[turn]
    rows, kv_heads = modes.shape
    n_prompt = cache.prompt_key.shape[2]
    n_tokens = 0
    for row in range(rows):
        for head in range(kv_heads):
            n_cached = n_prompt + n_own[row] - start[row]
            n_tokens += _n_tokens(modes[row, head], units.filled[row, head], n_cached)
    low, high = thread * n_tokens // n_threads, (thread + 1) * n_tokens // n_threads
    keeps_set_logits = rules.score_kept >= 0
    for unit in range(rows * kv_heads):
        row, head = unit // kv_heads, unit % kv_heads
        mode = modes[row, head]
        if mode == SKIP:
            continue
        shared = row % cache.prompt_key.shape[0]
        n = _n_tokens(mode, units.filled[row, head], n_prompt + n_own[row] - start[row])
        first, last = max(low, 0), min(high, n)
        low, high = low - n, high - n
        _nothing_yet(scratch.highest[thread, unit], scratch.total[thread, unit], scratch.partial[thread, unit])
        if first >= last:
            continue
        on_set = mode == RECYCLED
        keys, values, shift = units.set_key[row, head], units.set_value[row, head], 0
        if not on_set:
            keys, values = cache.prompt_key[shared, head], cache.prompt_value[shared, head]
            first, last = first + start[row], last + start[row]
        elif units.stale[row, head]:
            _copy_set(first, last, row, head, shared, cache, units)
        # A walk over the whole cache goes on from the prompt's part to the row's own.
        for part in range(1 if on_set else 2):
            begin, stop = first, last
            if part == 1:
                keys, values, shift = cache.own_key[row, head], cache.own_value[row, head], n_prompt
                begin, stop = max(first - n_prompt, 0), last - n_prompt
            elif not on_set:
                stop = min(last, n_prompt)
            attend_tokens(
                scratch.query[row, head],
                keys,
                values,
                begin,
                stop,
                products.scaling,
                products.softcap,
                scratch.block[thread],
                scratch.highest[thread, unit],
                scratch.total[thread, unit],
                scratch.partial[thread, unit],
                scratch.logits[unit],
                shift,
                keeps_set_logits if on_set else True,
                mode != KEYS_ONLY,
            )


@helper()
def _n_tokens(mode: int, n_in_set: int, n_cached: int) -> int:
    """What a unit walks over."""
    if mode == SKIP:
        return 0
    return n_in_set if mode == RECYCLED else n_cached


@helper()
def _nothing_yet(highest: Array, total: Array, partial: Array) -> None:
    for head in range(partial.shape[0]):
        highest[head], total[head] = NOTHING, 0
        for d in range(partial.shape[1]):
            partial[head, d] = 0


@helper()
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


@helper()
def _settle_share(
    thread: int,
    n_threads: int,
    turn: int,
    products: Products,
    start: Array,
    cache: Cache,
    n_own: Array,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """A thread's units: bring the threads' parts of each together, and see to its set."""
    kv_heads = units.filled.shape[1]
    for unit in range(thread, units.filled.size, n_threads):
        row, head = unit // kv_heads, unit % kv_heads
        mode = scratch.modes[turn, row, head]
        if mode == SKIP:
            continue
        merge(
            scratch.highest[:n_threads, unit],
            scratch.total[:n_threads, unit],
            scratch.partial[:n_threads, unit],
            scratch.attended[row, head],
            scratch.normaliser[unit],
            mode != KEYS_ONLY,
        )
        if mode != KEYS_ONLY and products.sink_logits.shape[0] > 0:
            leave_to_sinks(scratch.attended[row, head], scratch.normaliser[unit], products.sink_logits[head])
        _copy(scratch.unit_query[row], head, units.last_query[row], head)
        if mode == RECYCLED:
            units.stale[row, head] = False
            # A set that was chosen at this very step is ranked by what chose it.
            if scratch.modes[_REFRESH, row, head] == SKIP:
                _rank_anew(unit, row, head, thread, units, rules, scratch)
            continue
        _copy(scratch.unit_query[row], head, units.full_query[row], head)
        end = cache.prompt_key.shape[2] + n_own[row]
        if rules.wants_refresh:
            mark_set(row, head, thread, units, scratch)
        if rules.wants_refresh or not units.setless[row, head]:
            choose_set(row, head, thread, start, end, units, rules, scratch)
        if rules.wants_refresh:
            measure_set(row, head, thread, start, end, units, signals, scratch)


@helper()
def _rank_anew(unit: int, row: int, head: int, thread: int, units: Units, rules: Rules, scratch: Scratch) -> None:
    """Let the attention of a recycled step rank the set that it attended to, where ranks are kept up to date."""
    if rules.score_kept < 0:
        return
    filled, scores, latest = units.filled[row, head], units.scores[row, head], scratch.token_score[thread]
    group_scores(scratch.logits[unit], scratch.normaliser[unit], np.int64(0), filled, rules.group_mean, latest)
    kept = np.float32(rules.score_kept)
    for slot in range(filled):
        scores[slot] = scores[slot] * kept + latest[slot]
