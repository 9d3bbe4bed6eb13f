"""New sets by keys alone: the scoring pass that comes before `attend` where units refresh so."""

from __future__ import annotations

from numba import njit, prange

from recycler.decode.cpu.arrays import Array, Cache, Rules, Scratch, Signals, Units
from recycler.decode.cpu.attention import NOTHING, merge, score_tokens
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.new_set import choose_and_measure, choose_set
from recycler.decode.cpu.sets import admit


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
