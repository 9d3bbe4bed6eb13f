"""Attention of several query tokens per row to the same cache, as products of matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from policies.compiled.kernel import helper
from recycler.decode.cpu.arrays import Array, Cache, Rules
from recycler.decode.cpu.attention import NOTHING, copy, merge, multiply
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.scalars import exp, widen
from recycler.decode.cpu.tile import TILE_BYTES, TILE_ROWS, padded, tile_columns, tile_product
from recycler.decode.cpu.votes import vote

# Tokens whose keys and values are taken at once: whole tiles of them, which stay in the first cache.
_BLOCK_TOKENS = 48
# More queries than a row ever has.
ALL_VOTE = 2**40
# Whose numbers are added to, and whose are written over.
_ADD, _REPLACE = np.bool_(True), np.bool_(False)


class Asking(NamedTuple):
    """Query tokens of some rows, those of a row side by side.

    Attributes:
        first: int64 `(rows,)`: the first query of each row.
        n: int64 `(rows,)`: how many there are; 0 for rows that take no part.
        first_own: int64 `(rows,)`: own place of the first one's key. Every query sees what lies before it.
        query: Float `(queries, kv_heads, group, head_dim)`.
        attended: The same: their attention.
        votes: float32 `(rows, kv_heads, places)`: attention of a unit's voters, summed, then pooled over its heads.
        n_voters: How many of a row's queries vote, the last ones, if there are so many.
    """

    first: Array
    n: Array
    first_own: Array
    query: Array
    attended: Array
    votes: Array
    n_voters: int


class ManyScratch(NamedTuple):
    """Room for intermediate results. The heads of a unit's queries, query after query, are its *columns*.

    Attributes:
        packed: Float `(threads, head_dim, columns)`: the queries of a unit.
        block: Float `(threads, block, columns)`: logits of a block.
        keys: Float `(threads, block, head_dim)`.
        values: Float `(threads, block, whole tiles of head_dim)`.
        weights: Float `(threads, block, columns)`.
        best: Float `(threads, columns)`.
        logits: Float `(units, columns, places)`, scaled; of voters.
        highest: Float `(threads, units, columns)`: the largest logit of each thread's part.
        total: The same: sum of exp(logit - highest).
        partial: Float `(threads, units, columns, whole tiles of head_dim)`: sum of exp(logit - highest) x value.
        merged: Float `(threads, columns, whole tiles of head_dim)`.
        normaliser: Float `(threads, columns)`.
        summed: float32 `(threads, group, places)`.
    """

    packed: Array
    block: Array
    keys: Array
    values: Array
    weights: Array
    best: Array
    logits: Array
    highest: Array
    total: Array
    partial: Array
    merged: Array
    normaliser: Array
    summed: Array


def many_scratch(
    n_threads: int, n_units: int, n_queries: int, group: int, head_dim: int, places: int, like: Array
) -> ManyScratch:
    """Room for units with at most so many queries, over at most so many places, in the type of `like`."""
    # A tile takes six columns of weights at once, and writes whole vectors of logits.
    columns = padded(padded(n_queries * group, int(TILE_ROWS)), tile_columns(like.dtype))
    wide = padded(head_dim, tile_columns(like.dtype))

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, dtype=like.dtype)

    return ManyScratch(
        packed=zeros(n_threads, head_dim, columns),
        block=zeros(n_threads, _BLOCK_TOKENS, columns),
        keys=zeros(n_threads, _BLOCK_TOKENS, head_dim),
        values=zeros(n_threads, _BLOCK_TOKENS, wide),
        weights=zeros(n_threads, _BLOCK_TOKENS, columns),
        best=zeros(n_threads, columns),
        logits=np.empty((n_units, n_queries * group, places), dtype=like.dtype),
        highest=zeros(n_threads, n_units, columns),
        total=zeros(n_threads, n_units, columns),
        partial=zeros(n_threads, n_units, columns, wide),
        merged=zeros(n_threads, columns, wide),
        normaliser=zeros(n_threads, columns),
        summed=np.zeros((n_threads, group, places), dtype=np.float32),
    )


@kernel(parallel=True, fastmath={"contract"})
def attend_many(
    asking: Asking, scaling: float, start: Array, cache: Cache, rules: Rules, scratch: ManyScratch, n_threads: int
) -> None:
    """Attention of all queries to all that lies before them, and what the sets of their units are chosen by.

    Args:
        asking: The queries; gets attention and votes.
        scaling: Factor on query x key.
        start: int64 `(rows,)`: place of each row's first token.
        cache: Of the layer, with the queries' own keys and values in it.
        rules: How votes are pooled over a group.
        scratch: Room for it.
        n_threads: Threads to use.
    """
    for thread in prange(n_threads):
        _attend_share(np.int64(thread), n_threads, asking, scaling, start, cache, scratch)
    for thread in prange(n_threads):
        _settle_share(np.int64(thread), n_threads, asking, start, cache, rules, scratch)


@helper(fastmath={"contract"})
def _attend_share(
    thread: int, n_threads: int, asking: Asking, scaling: float, start: Array, cache: Cache, scratch: ManyScratch
) -> None:
    """A thread's part of every unit's tokens."""
    kv_heads, group = asking.query.shape[1:3]
    n_prompt = cache.prompt_key.shape[2]
    packed = scratch.packed[thread]
    for unit in range(len(asking.n) * kv_heads):
        row, head = unit // kv_heads, unit % kv_heads
        if asking.n[row] == 0:
            continue
        n_columns, first_voting = asking.n[row] * group, max(asking.n[row] - asking.n_voters, 0) * group
        # Whole tiles: what is past the last column means nothing.
        width = min(-(-n_columns * packed.itemsize // TILE_BYTES) * TILE_BYTES // packed.itemsize, packed.shape[1])
        _pack(asking.query, asking.first[row], asking.n[row], head, asking.query.dtype.type(scaling), packed)
        highest, total = scratch.highest[thread, unit], scratch.total[thread, unit]
        partial = scratch.partial[thread, unit]
        highest[:], total[:], partial[:] = NOTHING, 0, 0
        own_begin, shared = asking.first_own[row], row % cache.prompt_key.shape[0]
        end = n_prompt + own_begin + asking.n[row]
        n = end - start[row]
        low, high = start[row] + thread * n // n_threads, start[row] + (thread + 1) * n // n_threads
        while low < high:
            n_block = min(_BLOCK_TOKENS, high - low)
            if low < n_prompt:
                n_block = min(n_block, n_prompt - low)
                keys, first_key = taken(cache.prompt_key[shared, head], low, n_block, scratch.keys[thread])
                values, first_value = taken(cache.prompt_value[shared, head], low, n_block, scratch.values[thread])
            else:
                keys, first_key = taken(cache.own_key[row, head], low - n_prompt, n_block, scratch.keys[thread])
                values, first_value = taken(cache.own_value[row, head], low - n_prompt, n_block, scratch.values[thread])
            logits = scratch.block[thread]
            _multiply_keys(keys, first_key, packed, n_block, n_columns, logits)
            # Of the queries' own tokens each sees those before it.
            for j in range(max(n_prompt + own_begin - low, 0), n_block):
                logits[j, : (low + j - n_prompt - own_begin) * group] = NOTHING
            weights = scratch.weights[thread]
            _keep_logits(logits, n_block, first_voting, n_columns, scratch.logits[unit], low)
            of_columns = scratch.best[thread, :width], highest[:width], total[:width]
            _weigh(logits, n_block, of_columns, partial, n_columns, weights)
            _multiply_values(weights, values, first_value, n_block, n_columns, partial)
            low += n_block


@helper(fastmath=True)
def _pack(query: Array, first: int, n: int, head: int, scale: float, packed: Array) -> None:
    group, head_dim = query.shape[2:]
    for i in range(n):
        for member in range(group):
            for d in range(head_dim):
                packed[d, i * group + member] = query[first + i, head, member, d] * scale


def taken(tokens: Array, begin: int, n: int, block: Array) -> tuple[Array, int]:
    """Some tokens as whole tiles of floats, and the row where they begin: where they lie, or copied into a block."""
    raise NotImplementedError("only for use inside kernels")


@overload(taken)
def _taken(tokens: Any, begin: Any, n: Any, block: Any) -> Any:
    def copied(tokens: Any, begin: Any, n: Any, block: Any) -> Any:
        _take(tokens, begin, n, block)
        return block, np.int64(0)

    def in_place(tokens: Any, begin: Any, n: Any, block: Any) -> Any:
        if n % TILE_ROWS == 0 and tokens.shape[1] == block.shape[1]:
            return tokens, np.int64(begin)
        _take(tokens, begin, n, block)
        return block, np.int64(0)

    return in_place if isinstance(tokens.dtype, types.Float) else copied


@helper(fastmath=True)
def _take(tokens: Array, begin: int, n: int, block: Array) -> None:
    for j in range(n):
        _widen_row(tokens[begin + j], block[j])


@helper(fastmath=True)
def _widen_row(source: Array, target: Array) -> None:
    for d in range(source.shape[0]):
        target[d] = widen(source[d])


@helper()
def _multiply_keys(keys: Array, first: int, packed: Array, n: int, n_columns: int, logits: Array) -> None:
    """Logits of tokens: rows by `TILE_ROWS`, what is past the last one means nothing."""
    head_dim, columns = packed.shape
    step = TILE_BYTES // packed.itemsize
    for column in range(0, n_columns, step):
        for j in range(0, n, TILE_ROWS):
            of_keys, of_queries = (keys, (first + j) * head_dim, head_dim, 1), (packed, column, columns)
            tile_product(*of_keys, *of_queries, head_dim, logits, j * columns + column, columns, _REPLACE)


@helper()
def _multiply_values(weights: Array, values: Array, first: int, n: int, n_columns: int, out: Array) -> None:
    """Add to `out[column]` the values of n tokens by their weights."""
    columns, wide = weights.shape[1], values.shape[1]
    step = TILE_BYTES // values.itemsize
    for d in range(0, wide, step):
        for column in range(0, n_columns, TILE_ROWS):
            of_values = values, first * wide + d, wide
            tile_product(weights, column, 1, columns, *of_values, n, out, column * wide + d, wide, _ADD)


# Loops over slices in functions of their own: written out above, they do not vectorise.
@helper(fastmath=True)
def _weigh(
    logits: Array, n: int, of_columns: tuple[Array, Array, Array], partial: Array, n_columns: int, weights: Array
) -> None:
    """Turn logits into weights relative to the highest so far of each column (online softmax, arXiv 1805.02867)."""
    best, highest, total = of_columns
    # Rows of arrays that lie in one piece: of others numba does not know that numbers lie side by side.
    width = best.shape[0]
    copy(highest, best)
    _raise(logits, n, best)
    for column in range(n_columns):
        if best[column] > highest[column]:
            shrink = exp(highest[column] - best[column])
            total[column] *= shrink
            multiply(partial[column], shrink)
    copy(best, highest)
    for j in range(n):
        _exponentials(logits[j, :width], best, weights[j, :width])
        _sum(weights[j, :width], total)


@helper(fastmath=True)
def _keep_logits(block: Array, n: int, first: int, n_columns: int, logits: Array, begin: int) -> None:
    """Write the columns of a block to rows, where tokens lie side by side."""
    for column in range(first, n_columns):
        row = logits[column, begin : begin + n]
        for j in range(n):
            row[j] = block[j, column]


@helper(fastmath=True)
def _raise(logits: Array, n: int, best: Array) -> None:
    # In this order: as many columns as a vector has are gone through at once.
    for i in range(best.shape[0]):
        top = best[i]
        for j in range(n):
            logit = logits[j, i]
            top = logit if logit > top else top
        best[i] = top


@helper(fastmath=True)
def _exponentials(row: Array, top: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = exp(row[i] - top[i])


@helper(fastmath=True)
def _sum(row: Array, total: Array) -> None:
    for i in range(total.shape[0]):
        total[i] += row[i]


@helper(fastmath={"contract"})
def _settle_share(
    thread: int, n_threads: int, asking: Asking, start: Array, cache: Cache, rules: Rules, scratch: ManyScratch
) -> None:
    """A thread's units: bring the threads' parts together, and let the queries vote."""
    kv_heads, group, head_dim = asking.query.shape[1:]
    merged, normaliser = scratch.merged[thread], scratch.normaliser[thread]
    for unit in range(thread, len(asking.n) * kv_heads, n_threads):
        row, head = unit // kv_heads, unit % kv_heads
        n = asking.n[row]
        if n == 0:
            continue
        of_threads = scratch.highest[:n_threads, unit], scratch.total[:n_threads, unit]
        merge(of_threads[0], of_threads[1], scratch.partial[:n_threads, unit], merged, normaliser, True)
        for i in range(n):
            for member in range(group):
                for d in range(head_dim):
                    asking.attended[asking.first[row] + i, head, member, d] = merged[i * group + member, d]
        end = cache.prompt_key.shape[2] + asking.first_own[row] + n
        voting = slice(max(n - asking.n_voters, 0) * group, n * group)
        logits, votes = scratch.logits[unit, voting], asking.votes[row, head]
        vote(logits, start[row], end, normaliser[voting], rules.group_mean, scratch.summed[thread], votes)
