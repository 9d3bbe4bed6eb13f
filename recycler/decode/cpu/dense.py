"""What a decoder layer does besides attention: `project` before the decision, `feed` after; at the end `predict`."""

from __future__ import annotations

import numpy as np
from numba import prange

from policies.compiled.kernel import helper
from recycler.decode.cpu.arrays import (
    LAYER_SIMILARITY,
    QUERY_SIMILARITY,
    STEP_SIMILARITY,
    Array,
    Cache,
    Fed,
    LayerWeights,
    Rules,
    Scratch,
    Units,
)
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.linear import ADD, FIRST_COLUMN, REPLACE, linear, rms_norm
from recycler.decode.cpu.scalars import exp, narrow, widen


@kernel(parallel=True, fastmath=True)
def project(
    x: Array,
    weights: LayerWeights,
    cosine: Array,
    sine: Array,
    cache: Cache,
    fed: Fed,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
    n_threads: int,
) -> None:
    """Norm, query, key and value with rotary embedding; the new token goes into the cache; similarities are measured.

    Args:
        x: Float `(rows, hidden)`: the residual stream.
        weights: Of the layer.
        cosine: Float `(rows or 1, head_dim)`, of the rotary embedding at this step's places.
        sine: The same.
        cache: With room where the tokens go.
        fed: Where each token goes.
        units: State of the layer.
        signals: Gets the similarities.
        rules: Which of them.
        scratch: Gets queries.
        n_threads: Threads to use.
    """
    rms_norm(x, weights.norm, weights.eps, scratch.normed)
    for thread in prange(n_threads):
        _project_share(np.int64(thread), n_threads, weights, scratch)
    _rotate_and_measure(weights, cosine, sine, cache, fed, units, signals, rules, scratch)


@helper(fastmath=True)
def _rotate_and_measure(
    weights: LayerWeights,
    cosine: Array,
    sine: Array,
    cache: Cache,
    fed: Fed,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
) -> None:
    _rotate_and_append(weights, cosine, sine, cache, fed, scratch)
    measure_similarities(units, signals, rules, scratch)


@helper(fastmath=True)
def measure_similarities(units: Units, signals: Array, rules: Rules, scratch: Scratch) -> None:
    """Cosines between the step's queries and earlier ones, as far as they are wanted."""
    if rules.wants_query_similarity:
        _cosine_similarity(scratch.unit_query, units.full_query, signals, QUERY_SIMILARITY)
    if rules.wants_step_similarity:
        _cosine_similarity(scratch.unit_query, units.last_query, signals, STEP_SIMILARITY)
    if rules.wants_layer_similarity:
        _layer_similarity(scratch.unit_query, units.full_query, signals)


@helper(fastmath=True)
def _project_share(thread: int, n_threads: int, weights: LayerWeights, scratch: Scratch) -> None:
    """A thread's outputs of query, key and value."""
    n_queries, n_keys = weights.query.shape[0], weights.key.shape[0]
    low, high = thread * n_queries // n_threads, (thread + 1) * n_queries // n_threads
    linear(scratch.normed, weights.query, weights.query_bias, scratch.projected, FIRST_COLUMN, low, high, REPLACE)
    low, high = thread * n_keys // n_threads, (thread + 1) * n_keys // n_threads
    linear(scratch.normed, weights.key, weights.key_bias, scratch.projected, n_queries, low, high, REPLACE)
    column = n_queries + n_keys
    linear(scratch.normed, weights.value, weights.value_bias, scratch.projected, column, low, high, REPLACE)


@helper(fastmath=True)
def _rotate_and_append(
    weights: LayerWeights, cosine: Array, sine: Array, cache: Cache, fed: Fed, scratch: Scratch
) -> None:
    rows, kv_heads, group, head_dim = scratch.query.shape
    stored = cache.own_key[0, 0, 0, 0]
    key = np.empty(head_dim, dtype=scratch.query.dtype)
    for row in range(rows):
        cos, sin = cosine[row % cosine.shape[0]], sine[row % cosine.shape[0]]
        of_row, place = fed.row[row], fed.own[row]
        heads = scratch.projected[row].reshape(kv_heads * (group + 2), head_dim)
        for kv_head in range(kv_heads):
            mean = scratch.unit_query[row, kv_head]
            for d in range(head_dim):
                mean[d] = 0
            for member in range(group):
                query = scratch.query[row, kv_head, member]
                _rotate(heads[kv_head * group + member], weights.query_norm, weights.head_eps, cos, sin, query)
                for d in range(head_dim):
                    mean[d] += query[d]
            for d in range(head_dim):
                mean[d] /= group
            _rotate(heads[kv_heads * group + kv_head], weights.key_norm, weights.head_eps, cos, sin, key)
            value = heads[kv_heads * (group + 1) + kv_head]
            for d in range(head_dim):
                cache.own_key[of_row, kv_head, place, d] = narrow(key[d], stored)
                cache.own_value[of_row, kv_head, place, d] = narrow(value[d], stored)


@helper(fastmath=True)
def _rotate(vector: Array, norm: Array, eps: float, cosine: Array, sine: Array, out: Array) -> None:
    """The norm of a head, if any, then rotary embedding (arXiv 2104.09864), halves as transformers has them."""
    head_dim = vector.shape[0]
    half = head_dim // 2
    if norm.shape[0] > 0:
        total = vector.dtype.type(0)
        for d in range(head_dim):
            total += vector[d] * vector[d]
        factor = vector.dtype.type(1 / (total / head_dim + eps) ** 0.5)
        for d in range(head_dim):
            vector[d] = vector[d] * factor * widen(norm[d])
    for d in range(half):
        out[d] = vector[d] * cosine[d] - vector[d + half] * sine[d]
        out[d + half] = vector[d + half] * cosine[d + half] + vector[d] * sine[d + half]


@helper(fastmath=True)
def _cosine_similarity(now: Array, then: Array, signals: Array, which: int) -> None:
    rows, kv_heads, head_dim = now.shape
    for row in range(rows):
        for kv_head in range(kv_heads):
            product, a, b = 0.0, 0.0, 0.0
            for d in range(head_dim):
                product += now[row, kv_head, d] * then[row, kv_head, d]
                a += now[row, kv_head, d] * now[row, kv_head, d]
                b += then[row, kv_head, d] * then[row, kv_head, d]
            signals[row, which, kv_head] = product / (max(a**0.5, 1e-8) * max(b**0.5, 1e-8))


@helper(fastmath=True)
def _layer_similarity(now: Array, then: Array, signals: Array) -> None:
    """The cosine between means over the KV heads, for every unit of a row."""
    rows, kv_heads, head_dim = now.shape
    for row in range(rows):
        product, a, b = 0.0, 0.0, 0.0
        for d in range(head_dim):
            mean_now, mean_then = 0.0, 0.0
            for kv_head in range(kv_heads):
                mean_now += now[row, kv_head, d] / kv_heads
                mean_then += then[row, kv_head, d] / kv_heads
            product += mean_now * mean_then
            a += mean_now * mean_now
            b += mean_then * mean_then
        for kv_head in range(kv_heads):
            signals[row, LAYER_SIMILARITY, kv_head] = product / (max(a**0.5, 1e-8) * max(b**0.5, 1e-8))


@kernel(parallel=True, fastmath=True)
def feed(x: Array, weights: LayerWeights, scratch: Scratch, n_threads: int) -> None:
    """Output projection and the gated feed-forward layer (arXiv 2002.05202, SwiGLU), added to the residual stream."""
    for stage in range(3):
        if stage == 1:
            rms_norm(x, weights.feed_norm, weights.feed_eps, scratch.normed)
        for thread in prange(n_threads):
            _feed_share(np.int64(thread), n_threads, stage, x, weights, scratch)


@helper(fastmath=True)
def _feed_share(thread: int, n_threads: int, stage: int, x: Array, weights: LayerWeights, scratch: Scratch) -> None:
    """A thread's outputs of the output projection (0), of gate and up (1), or of down (2)."""
    n_outputs = scratch.gate.shape[1] if stage == 1 else x.shape[1]
    low, high = thread * n_outputs // n_threads, (thread + 1) * n_outputs // n_threads
    if stage == 0:
        attended = scratch.attended.reshape(x.shape[0], -1)
        linear(attended, weights.output, weights.output_bias, x, FIRST_COLUMN, low, high, ADD)
    elif stage == 1:
        linear(scratch.normed, weights.gate, weights.gate_bias, scratch.gate, FIRST_COLUMN, low, high, REPLACE)
        linear(scratch.normed, weights.up, weights.up_bias, scratch.up, FIRST_COLUMN, low, high, REPLACE)
        _gate(scratch.gate, scratch.up, low, high)
    else:
        linear(scratch.gate, weights.down, weights.down_bias, x, FIRST_COLUMN, low, high, ADD)


@helper(fastmath=True)
def _gate(gate: Array, up: Array, low: int, high: int) -> None:
    """`gate = silu(gate) * up` in some columns."""
    for row in range(gate.shape[0]):
        for i in range(low, high):
            g = gate[row, i]
            # The sigmoid by e^-|g|: our exponential is for arguments up to 0.
            shrunk = exp(-abs(g))
            gate[row, i] = up[row, i] * g * (1 if g > 0 else shrunk) / (1 + shrunk)


@kernel(parallel=True, fastmath=True)
def predict(
    x: Array, norm: Array, eps: float, head: Array, head_bias: Array, scratch: Scratch, logits: Array, n_threads: int
) -> None:
    """The last norm and the language-model head; `logits` is Float `(rows, vocabulary)`."""
    rms_norm(x, norm, eps, scratch.normed)
    for thread in prange(n_threads):
        _predict_share(np.int64(thread), n_threads, scratch.normed, head, head_bias, logits)


@helper(fastmath=True)
def _predict_share(thread: int, n_threads: int, normed: Array, head: Array, head_bias: Array, logits: Array) -> None:
    """A thread's outputs of the head."""
    n_outputs = head.shape[0]
    low, high = thread * n_outputs // n_threads, (thread + 1) * n_outputs // n_threads
    linear(normed, head, head_bias, logits, FIRST_COLUMN, low, high, REPLACE)
