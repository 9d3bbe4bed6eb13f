"""Between the queries of a layer and its attention: signals, the decision, and the new token's place in the sets."""

from __future__ import annotations

import triton
import triton.language as tl

from policies import SIGNALS
from recycler.decode.cuda.own_tokens import own_tokens
from recycler.decode.cuda.program import run_program
from recycler.decode.cuda.shares import FULL, KEYS_ONLY, RECYCLED, SKIP

_STEP, _AGE, _N_FULL, _QUERY, _LAST, _LAYER, _MASS, _OVERLAP = (
    tl.constexpr(SIGNALS.index(name))
    for name in (
        "step",
        "age",
        "n_full",
        "query_similarity",
        "step_similarity",
        "layer_similarity",
        "refresh_mass",
        "refresh_overlap",
    )
)


@triton.jit
def _cosine(a, b):
    """As torch has it, in float64."""
    lengths = tl.maximum(tl.sqrt(tl.sum(a * a)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(b * b)), 1e-8)
    return (tl.sum(a * b) / lengths).to(tl.float64)


@triton.jit
def mean_query(query, unit, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mean of the queries of a unit's group, float32."""
    channel = tl.arange(0, HEAD_DIM)
    total = tl.zeros((HEAD_DIM,), tl.float32)
    for member in tl.static_range(GROUP):
        total += tl.load(query + (unit * GROUP + member) * HEAD_DIM + channel).to(tl.float32)
    return total / GROUP


@triton.jit(do_not_specialize=["n_all_units"])
def compare(
    rows,
    query,
    queries,
    signals,
    n_all_units,
    WANTS_QUERY: tl.constexpr,
    WANTS_LAST: tl.constexpr,
    WANTS_LAYER: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Measure similarities: a part of `prepare`, and a kernel for policies that are called between the kernels.

    Arguments are those of `prepare`, and the signals of its decisions.
    """
    unit = tl.load(rows + tl.program_id(0) // KV_HEADS) * KV_HEADS + tl.program_id(0) % KV_HEADS
    channel = tl.arange(0, HEAD_DIM)
    if WANTS_QUERY or WANTS_LAST:
        now = mean_query(query, unit, GROUP, HEAD_DIM)
        if WANTS_QUERY:
            then = tl.load(queries.full + unit * HEAD_DIM + channel)
            tl.store(signals + _QUERY * n_all_units + unit, _cosine(now, then))
        if WANTS_LAST:
            then = tl.load(queries.last + unit * HEAD_DIM + channel)
            tl.store(signals + _LAST * n_all_units + unit, _cosine(now, then))
    if WANTS_LAYER:
        # Groups are of one size, so the mean of their means is the mean over all query heads.
        now = tl.zeros((HEAD_DIM,), tl.float32)
        then = tl.zeros((HEAD_DIM,), tl.float32)
        first = unit - unit % KV_HEADS
        for head in range(KV_HEADS):
            now += mean_query(query, first + head, GROUP, HEAD_DIM)
            then += tl.load(queries.full + (first + head) * HEAD_DIM + channel)
        tl.store(signals + _LAYER * n_all_units + unit, _cosine(now / KV_HEADS, then / KV_HEADS))


@triton.jit
def _admit(
    place,
    first,
    size,
    sets,
    unit,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NEWCOMER: tl.constexpr,
):
    """Take the newest token into a set, as `RecycledSet.admit` does. Returns its tokens afterwards."""
    positions, scores = sets.positions + unit * K, sets.scores + unit * K
    n_tokens = tl.load(sets.filled + unit)
    slot = tl.arange(0, SLOTS)
    filled = slot < n_tokens
    held = tl.load(positions + slot, mask=filled, other=0)
    bits = tl.load(scores + slot, mask=filled, other=0).to(tl.int32, bitcast=True)
    rank = (bits.to(tl.int64) << 32) | held.to(tl.int64)
    stays = (held < first + SINKS) | (held > place - WINDOW) | (filled == 0)
    rank = tl.where(stays, 0x7FFFFFFFFFFFFFFF, rank)
    lowest = tl.min(tl.where(rank == tl.min(rank), slot, K))
    to = tl.where(n_tokens < size, n_tokens, lowest)
    # All threads have read the set before one writes to it.
    tl.debug_barrier()
    tl.store(positions + to, place)
    tl.store(scores + to, NEWCOMER)
    n_tokens = tl.minimum(n_tokens + 1, size)
    tl.store(sets.filled + unit, n_tokens)
    return n_tokens


@triton.jit(do_not_specialize=["n_all_units", "n_table_units", "constants_row", "tables_row", "n_prompt"])
def prepare(
    rows,
    query,
    key,
    value,
    cached,
    cache,
    sets,
    sizes,
    queries,
    decisions,
    modes_before,
    modes,
    constants,
    tables,
    n_all_units,
    n_table_units,
    constants_row,
    tables_row,
    n_prompt,
    CODE: tl.constexpr,
    RESULTS: tl.constexpr,
    WANTS_QUERY: tl.constexpr,
    WANTS_LAST: tl.constexpr,
    WANTS_LAYER: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NEWCOMER: tl.constexpr,
):
    """Measure, decide, write down what was decided, and take in the new token; a program per unit.

    Units of rows that do not take the step do nothing in it.

    The cache's own part gets this step's key and value, and sets the new token; the last queries become this step's.
    Decisions follow from the signals or, for an empty CODE, from what is given.

    Args:
        rows: int32 `(n,)`: the rows of these programs.
        query: As stored, `(rows, kv_heads, group, head_dim)`, after rotary embedding.
        key: As stored, `(rows, kv_heads, head_dim)`: this step's.
        value: The same.
        modes_before: int8 `(units,)`: gets the modes of the walk before the attention, in which keys-only refreshes
            score the cache.
        modes: int8 `(units,)`: gets those of the attention.
        constants: Of a `DeviceProgram`.
        tables: The same, at this layer.
        n_table_units: KV heads of all layers.
        constants_row: From the constants of one row to those of the next; 0 if all have the same.
        tables_row: The same of tables.
        CODE: Of a `DeviceProgram`, or empty.
        RESULTS: The same.
        WANTS_QUERY: Whether the policy reads the query similarity; like what follows.
        WANTS_LAST: The step similarity.
        WANTS_LAYER: The layer similarity.
        SLOTS: K, to the next power of 2.
        NEWCOMER: Score of a token that arrives.
    """
    nth, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    row = tl.load(rows + nth)
    unit = row * KV_HEADS + head
    if tl.load(cached.going + row) == 0:
        tl.store(modes_before + unit, SKIP)
        tl.store(modes + unit, SKIP)
        return
    at = decisions.signals + unit
    if len(CODE) > 0:
        compare(
            rows,
            query,
            queries,
            decisions.signals,
            n_all_units,
            WANTS_QUERY,
            WANTS_LAST,
            WANTS_LAYER,
            KV_HEADS,
            GROUP,
            HEAD_DIM,
        )
        tl.debug_barrier()
        constants += nth * constants_row
        tables += nth * tables_row + head
        registers = run_program(at, constants, tables, n_all_units, n_table_units, CODE)
        full = registers[RESULTS[0]] != 0
        for i in tl.static_range(1, len(RESULTS)):
            count = decisions.overruled + (i - 1) * n_all_units + unit
            tl.store(count, tl.load(count) + (registers[RESULTS[i]] != 0).to(tl.int32))
    else:
        full = tl.load(decisions.given + unit) != 0
    led = tl.load(decisions.led + row) != 0
    full = full | led
    scores_keys = full & (tl.load(decisions.by_keys + unit) != 0) & (led == 0)
    tl.store(decisions.decided + unit, full.to(tl.int8))
    tl.store(modes_before + unit, tl.where(scores_keys, KEYS_ONLY, SKIP).to(tl.int8))
    tl.store(modes + unit, tl.where(full & (scores_keys == 0), FULL, RECYCLED).to(tl.int8))

    channel = tl.arange(0, HEAD_DIM)
    tl.store(queries.last + unit * HEAD_DIM + channel, mean_query(query, unit, GROUP, HEAD_DIM))
    n_before = tl.load(cached.n_own + row)
    own_key, own_value = own_tokens(cache.own, key.dtype.element_ty)
    to = (unit.to(tl.int64) * tl.load(cache.room) + n_before) * HEAD_DIM + channel
    tl.store(own_key + to, tl.load(key + unit * HEAD_DIM + channel))
    tl.store(own_value + to, tl.load(value + unit * HEAD_DIM + channel))

    place, first, size = n_prompt + n_before, tl.load(cached.start + row), tl.load(sizes + head)
    n_tokens = _admit(place, first, size, sets, unit, K, SLOTS, SINKS, WINDOW, NEWCOMER)
    n_cached = place + 1 - first
    n_chosen = tl.minimum(size, n_cached)
    read = tl.where(full, n_cached, n_tokens).to(tl.float64)
    read = tl.where(scores_keys, (n_chosen + n_cached) * 0.5, read)
    tl.store(decisions.tokens_read + unit, read)
    tl.store(decisions.all_tokens_read + unit, tl.load(decisions.all_tokens_read + unit) + read)

    tl.store(at + _STEP * n_all_units, tl.load(at + _STEP * n_all_units) + 1)
    tl.store(at + _N_FULL * n_all_units, tl.load(at + _N_FULL * n_all_units) + full.to(tl.float64))
    tl.store(at + _AGE * n_all_units, tl.where(full, 0.0, tl.load(at + _AGE * n_all_units)) + 1)
    if full:
        # Not known, until the new set is measured.
        tl.store(at + _MASS * n_all_units, float("nan"))
        tl.store(at + _OVERLAP * n_all_units, float("nan"))
