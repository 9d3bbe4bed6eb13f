"""Attention of one query token per row, every unit over its own tokens, split evenly over the threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.compiled.kernel import helper
from recycler.decode.cpu.scalars import exp, prefetch, widen

# Tokens whose logits are computed before their values are read; keys and values of a block stay in the first cache.
BLOCK_TOKENS = 32
_LINE_BYTES = 64
# The largest logit of no tokens.
NOTHING = -1e30


@helper(fastmath=True)
def attend_tokens(
    query: Any,
    keys: Any,
    values: Any,
    begin: int,
    end: int,
    scaling: float,
    softcap: float,
    block: Any,
    highest: Any,
    total: Any,
    output: Any,
    logits: Any,
    first_logit: int,
    keep_logits: bool,
    reads_values: bool,
) -> None:
    """Go on with one unit's attention over some of its tokens (online softmax, arXiv 1805.02867).

    Args:
        query: Float `(group, head_dim)`.
        keys: `(tokens, head_dim)` as stored.
        values: `(tokens, head_dim)` as stored.
        begin: First token.
        end: One past the last.
        scaling: Factor on query x key.
        softcap: As in `Products`.
        block: Float `(group, BLOCK_TOKENS)`, for intermediate results.
        highest: Float `(group,)`: the largest logit so far, `NOTHING` at first.
        total: Float `(group,)`: sum of exp(logit - highest) so far.
        output: Float `(group, head_dim)`: sum of exp(logit - highest) x value so far.
        logits: Float `(group, places)`: where logits are kept.
        first_logit: Place of the logit of token 0.
        keep_logits: Whether to keep them.
        reads_values: False for logits and the sum of their exponentials alone; values may then be any array.
    """
    group = query.shape[0]
    scale = query.dtype.type(scaling)
    next_read, ahead = (values, 0) if reads_values else (keys, BLOCK_TOKENS)
    for low in range(begin, end, BLOCK_TOKENS):
        n = min(BLOCK_TOKENS, end - low)
        _logits(query, keys, next_read, ahead, low, n, scale, block)
        for head in range(group):
            if softcap > 0:
                _cap(block[head, :n], query.dtype.type(softcap))
            if keep_logits:
                copy(block[head, :n], logits[head, first_logit + low : first_logit + low + n])
            _weigh(block[head, :n], head, highest, total, output)
        if reads_values:
            _add_values(block, values, keys, low, n, output)


# Loops over slices in functions of their own: written out above, they do not vectorise.
@helper(fastmath=True)
def copy(source: Any, target: Any) -> None:
    for j in range(source.shape[0]):
        target[j] = source[j]


@helper(fastmath=True)
def multiply(row: Any, factor: Any) -> None:
    for i in range(row.shape[0]):
        row[i] *= factor


@helper(fastmath=True)
def _cap(row: Any, softcap: Any) -> None:
    for j in range(row.shape[0]):
        row[j] = softcap * np.tanh(row[j] / softcap)


@helper(fastmath=True)
def _weigh(row: Any, head: int, highest: Any, total: Any, output: Any) -> None:
    """Turn a head's logits into weights relative to the highest so far."""
    best = row[0]
    for j in range(row.shape[0]):
        best = max(best, row[j])
    if best > highest[head]:
        shrink = exp(highest[head] - best)
        total[head] *= shrink
        for d in range(output.shape[1]):
            output[head, d] *= shrink
        highest[head] = best
    top, added = highest[head], row.dtype.type(0)
    for j in range(row.shape[0]):
        weight = exp(row[j] - top)
        row[j] = weight
        added += weight
    total[head] += added


@helper(fastmath=True)
def _logits(query: Any, keys: Any, next_read: Any, ahead: int, low: int, n: int, scale: Any, block: Any) -> None:
    group, head_dim = query.shape
    zero = query.dtype.type(0)
    line = _LINE_BYTES // keys.itemsize
    for j in range(0, n - 3, 4):
        token = low + j
        # Memory works meanwhile on what is read next: the values of the block, or the keys of the next one.
        for column in range(0, 4 * head_dim, line):
            prefetch(next_read, token + ahead, column)
        for head in range(group):
            a, b, c, e = zero, zero, zero, zero
            for d in range(head_dim):
                q = query[head, d]
                a += q * widen(keys[token, d])
                b += q * widen(keys[token + 1, d])
                c += q * widen(keys[token + 2, d])
                e += q * widen(keys[token + 3, d])
            block[head, j] = a * scale
            block[head, j + 1] = b * scale
            block[head, j + 2] = c * scale
            block[head, j + 3] = e * scale
    for j in range(n - n % 4, n):
        for head in range(group):
            a = zero
            for d in range(head_dim):
                a += query[head, d] * widen(keys[low + j, d])
            block[head, j] = a * scale


@helper(fastmath=True)
def _add_values(weights: Any, values: Any, keys: Any, low: int, n: int, output: Any) -> None:
    group, head_dim = output.shape
    line = _LINE_BYTES // keys.itemsize
    for j in range(0, n - 3, 4):
        token = low + j
        # And on the keys of the next block, which lie one behind the other.
        for column in range(0, 4 * head_dim, line):
            prefetch(keys, token + BLOCK_TOKENS, column)
        for head in range(group):
            a, b, c, e = weights[head, j], weights[head, j + 1], weights[head, j + 2], weights[head, j + 3]
            for d in range(head_dim):
                output[head, d] += (
                    a * widen(values[token, d])
                    + b * widen(values[token + 1, d])
                    + c * widen(values[token + 2, d])
                    + e * widen(values[token + 3, d])
                )
    for j in range(n - n % 4, n):
        for head in range(group):
            a = weights[head, j]
            for d in range(head_dim):
                output[head, d] += a * widen(values[low + j, d])


@helper(fastmath=True)
def leave_to_sinks(out: Any, normaliser: Any, sink_logits: Any) -> None:
    """Take from a unit's attention, Float `(group, head_dim)`, what its sinks, Float `(group,)`, have of it."""
    for head in range(out.shape[0]):
        above = normaliser[head] - sink_logits[head]
        # The sigmoid by e^-|x|: our exponential is for arguments up to 0.
        shrunk = exp(-abs(above))
        multiply(out[head], (1 if above > 0 else shrunk) / (1 + shrunk))


@helper(fastmath={"contract"})
def merge(highest: Any, total: Any, output: Any, out: Any, normaliser: Any, reads_values: bool) -> None:
    """Bring the parts of one unit's attention together.

    Args:
        highest: Float `(parts, group)`, `NOTHING` where a part saw no tokens.
        total: Float `(parts, group)`.
        output: Float `(parts, group, head_dim)`.
        out: Float `(group, head_dim)`: the attention.
        normaliser: Float `(group,)`: log of the sum of exp(logit) over all tokens.
        reads_values: False if values were not read: then there is no attention.
    """
    parts, group, head_dim = output.shape
    for head in range(group):
        top = highest[0, head]
        for part in range(1, parts):
            top = max(top, highest[part, head])
        whole = highest.dtype.type(0)
        if reads_values:
            out[head] = 0
        for part in range(parts):
            weight = exp(highest[part, head] - top)
            whole += weight * total[part, head]
            if reads_values:
                for d in range(head_dim):
                    out[head, d] += weight * output[part, head, d]
        if reads_values:
            for d in range(head_dim):
                out[head, d] /= whole
        normaliser[head] = top + np.log(whole)
