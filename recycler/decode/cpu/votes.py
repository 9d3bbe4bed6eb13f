"""What a verification's queries attended to, summed: their votes, by which the next sets are chosen."""

from __future__ import annotations

import numpy as np
from numba import prange

from policies.compiled.kernel import helper
from recycler.decode.cpu.arrays import Array, Rules, Scratch, Units
from recycler.decode.cpu.attention import copy, multiply
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.scalars import exp
from recycler.decode.cpu.sets import choose_by_scores


@helper(fastmath=True)
def vote(logits: Array, begin: int, end: int, normaliser: Array, mean: bool, summed: Array, votes: Array) -> None:
    """Sum the attention of all queries to some tokens, then pool it over the heads of the group."""
    group = summed.shape[0]
    for column in range(normaliser.shape[0]):
        _add_attention(logits[column, begin:end], normaliser[column], column < group, summed[column % group, begin:end])
    copy(summed[0, begin:end], votes[begin:end])
    for member in range(1, group):
        _pool(summed[member, begin:end], mean, votes[begin:end])
    if mean:
        multiply(votes[begin:end], np.float32(1 / group))


@helper(fastmath=True)
def _add_attention(logits: Array, normaliser: float, is_first: bool, summed: Array) -> None:
    for j in range(summed.shape[0]):
        attention = np.float32(exp(min(logits[j] - normaliser, logits.dtype.type(0))))
        summed[j] = attention if is_first else summed[j] + attention


@helper(fastmath=True)
def _pool(scores: Array, mean: bool, votes: Array) -> None:
    for j in range(votes.shape[0]):
        votes[j] = votes[j] + scores[j] if mean else max(votes[j], scores[j])


@kernel(parallel=True)
def choose_by_votes(
    votes: Array, start: Array, ends: Array, units: Units, rules: Rules, scratch: Scratch, n_threads: int
) -> None:
    """Choose the sets of some rows by the votes of a verification.

    Args:
        votes: As in `Asking`.
        start: int64 `(rows,)`: place of each row's first token.
        ends: int64 `(rows,)`: one past the last token that is kept; 0 for rows whose sets stay.
        units: State of the layer; gets the sets.
        rules: The selection.
        scratch: Room for intermediate results.
        n_threads: Threads to use.
    """
    for thread in prange(n_threads):
        _choose_share(np.int64(thread), n_threads, votes, start, ends, units, rules, scratch)


@helper()
def _choose_share(
    thread: int,
    n_threads: int,
    votes: Array,
    start: Array,
    ends: Array,
    units: Units,
    rules: Rules,
    scratch: Scratch,
) -> None:
    kv_heads = units.filled.shape[1]
    for unit in range(thread, units.filled.size, n_threads):
        row, head = unit // kv_heads, unit % kv_heads
        if ends[row] > 0 and not units.setless[row, head]:
            choose_by_scores(row, head, thread, votes[row, head], start[row], ends[row], units, rules, scratch)
