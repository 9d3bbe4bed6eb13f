"""One layer of a decode step as three kernels: `project`, then, when the policy has decided, `attend` and `feed`."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from recycler.decode.cpu.arrays import Array, Cache, LayerWeights, Rules, Scratch, Signals, Units
from recycler.decode.cpu.attention import NOTHING, attend_tokens, merge
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.linear import linear, rms_norm
from recycler.decode.cpu.new_set import choose_and_measure, choose_set
from recycler.decode.cpu.scalars import exp, narrow, widen
from recycler.decode.cpu.sets import admit, group_scores


@kernel(parallel=True, fastmath=True)
def project(
    x: Array,
    weights: LayerWeights,
    cosine: Array,
    sine: Array,
    cache: Cache,
    n_own: int,
    units: Units,
    signals: Signals,
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
        cache: With room at own place `n_own`.
        n_own: Own tokens in it.
        units: State of the layer.
        signals: Gets the similarities.
        rules: Which of them.
        scratch: Gets queries.
        n_threads: Threads to use.
    """
    rms_norm(x, weights.norm, weights.eps, scratch.normed)
    n_queries, n_keys = weights.query.shape[0], weights.key.shape[0]
    for thread in prange(n_threads):
        low, high = thread * n_queries // n_threads, (thread + 1) * n_queries // n_threads
        linear(scratch.normed, weights.query, weights.query_bias, scratch.projected, 0, low, high, False)
        low, high = thread * n_keys // n_threads, (thread + 1) * n_keys // n_threads
        linear(scratch.normed, weights.key, weights.key_bias, scratch.projected, n_queries, low, high, False)
        column = n_queries + n_keys
        linear(scratch.normed, weights.value, weights.value_bias, scratch.projected, column, low, high, False)
    _rotate_and_append(weights, cosine, sine, cache, n_own, scratch)
    if rules.wants_query_similarity:
        _cosine_similarity(scratch.unit_query, units.full_query, signals.query_similarity)
    if rules.wants_step_similarity:
        _cosine_similarity(scratch.unit_query, units.last_query, signals.step_similarity)
    if rules.wants_layer_similarity:
        _layer_similarity(scratch.unit_query, units.full_query, signals.layer_similarity)


@njit(error_model="numpy", fastmath=True)
def _rotate_and_append(
    weights: LayerWeights, cosine: Array, sine: Array, cache: Cache, n_own: int, scratch: Scratch
) -> None:
    rows, kv_heads, group, head_dim = scratch.query.shape
    stored = cache.own_key[0, 0, 0, 0]
    key = np.empty(head_dim, dtype=scratch.query.dtype)
    for row in range(rows):
        cos, sin = cosine[row % cosine.shape[0]], sine[row % cosine.shape[0]]
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
                cache.own_key[row, kv_head, n_own, d] = narrow(key[d], stored)
                cache.own_value[row, kv_head, n_own, d] = narrow(value[d], stored)


@njit(error_model="numpy", fastmath=True)
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


@njit(error_model="numpy", fastmath=True)
def _cosine_similarity(now: Array, then: Array, similarity: Array) -> None:
    rows, kv_heads, head_dim = now.shape
    for row in range(rows):
        for kv_head in range(kv_heads):
            product, a, b = 0.0, 0.0, 0.0
            for d in range(head_dim):
                product += now[row, kv_head, d] * then[row, kv_head, d]
                a += now[row, kv_head, d] * now[row, kv_head, d]
                b += then[row, kv_head, d] * then[row, kv_head, d]
            similarity[row, kv_head] = product / (max(a**0.5, 1e-8) * max(b**0.5, 1e-8))


@njit(error_model="numpy", fastmath=True)
def _layer_similarity(now: Array, then: Array, similarity: Array) -> None:
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
            similarity[row, kv_head] = product / (max(a**0.5, 1e-8) * max(b**0.5, 1e-8))


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


@kernel(parallel=True, fastmath=True)
def feed(x: Array, weights: LayerWeights, scratch: Scratch, n_threads: int) -> None:
    """Output projection and the gated feed-forward layer (arXiv 2002.05202, SwiGLU), added to the residual stream."""
    rows, hidden = x.shape
    attended = scratch.attended.reshape(rows, -1)
    for thread in prange(n_threads):
        low, high = thread * hidden // n_threads, (thread + 1) * hidden // n_threads
        linear(attended, weights.output, weights.output_bias, x, 0, low, high, True)
    rms_norm(x, weights.feed_norm, weights.feed_eps, scratch.normed)
    width = scratch.gate.shape[1]
    for thread in prange(n_threads):
        low, high = thread * width // n_threads, (thread + 1) * width // n_threads
        linear(scratch.normed, weights.gate, weights.gate_bias, scratch.gate, 0, low, high, False)
        linear(scratch.normed, weights.up, weights.up_bias, scratch.up, 0, low, high, False)
        _gate(scratch.gate, scratch.up, low, high)
    for thread in prange(n_threads):
        low, high = thread * hidden // n_threads, (thread + 1) * hidden // n_threads
        linear(scratch.gate, weights.down, weights.down_bias, x, 0, low, high, True)


@njit(error_model="numpy", fastmath=True)
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
    n_outputs = head.shape[0]
    for thread in prange(n_threads):
        low, high = thread * n_outputs // n_threads, (thread + 1) * n_outputs // n_threads
        linear(scratch.normed, head, head_bias, logits, 0, low, high, False)
