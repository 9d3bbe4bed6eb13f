"""What the kernels work on, in named tuples: numba passes each as its fields.

*Float* is float64 in a float64 model and float32 otherwise; *as stored* is the model's own type, bfloat16 as its 16
bits in a uint16. Optional arrays are empty where there are none. A *unit* is numbered `row * kv_heads + kv_head`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class LayerWeights(NamedTuple):
    """A decoder layer's weights, as stored; matrices are `(outputs, inputs)`, biases and head norms optional."""

    norm: Array
    eps: float
    query: Array
    query_bias: Array
    key: Array
    key_bias: Array
    value: Array
    value_bias: Array
    query_norm: Array
    key_norm: Array
    head_eps: float
    scaling: float
    output: Array
    output_bias: Array
    feed_norm: Array
    feed_eps: float
    gate: Array
    gate_bias: Array
    up: Array
    up_bias: Array
    down: Array
    down_bias: Array


class Cache(NamedTuple):
    """All keys and values of a layer, as stored, in order of place.

    The prompt's part is `(rows or 1, kv_heads, tokens, head_dim)`, with one row if all rows share it. The rest is
    `(rows, kv_heads, room, head_dim)`: every row's own tokens since, and room for more.
    """

    prompt_key: Array
    prompt_value: Array
    own_key: Array
    own_value: Array


class Units(NamedTuple):
    """The state of a layer's units: their sets, and what their last full steps left behind.

    Attributes:
        set_key: `(rows, kv_heads, k, head_dim)`, as stored: a compact copy of each set.
        set_value: The same.
        positions: int64 `(rows, kv_heads, k)`: places of the sets' tokens, in the slots of the copies.
        scores: float32 of the same shape: what they are ranked by; infinite for tokens that came after the last full
            step.
        sizes: int64 `(kv_heads,)`: most tokens of each head's sets; k is the largest of the model.
        filled: int64 `(rows, kv_heads)`: tokens in each set, in the first slots.
        stale: bool `(rows, kv_heads)`: the set is chosen, and its copy is not made yet.
        fresh: bool `(rows, kv_heads)`: the set was chosen at this very step, for the unit refreshed by its keys alone.
        pending: int64 `(rows, kv_heads)`: tokens in the cache at the full step whose logits await a choice, else 0.
        logits: Float `(rows, kv_heads, group, places)`, scaled, of the last full step or keys-only refresh.
        normaliser: Float `(rows, kv_heads, group)`: log of the sum of their exponentials.
        full_query: Float `(rows, kv_heads, head_dim)`: mean query of the group at the last full step.
        last_query: The same at the last step.
    """

    set_key: Array
    set_value: Array
    positions: Array
    scores: Array
    sizes: Array
    filled: Array
    stale: Array
    fresh: Array
    pending: Array
    logits: Array
    normaliser: Array
    full_query: Array
    last_query: Array


class Signals(NamedTuple):
    """Measured signals of a layer, float64 `(rows, kv_heads)`; written where `Rules` wants them."""

    query_similarity: Array
    step_similarity: Array
    layer_similarity: Array
    refresh_mass: Array
    refresh_overlap: Array


class Rules(NamedTuple):
    """A selection and what the policy wants to be measured, as plain numbers."""

    sinks: int
    window: int
    pool_backward: int
    pool_forward: int
    group_mean: bool
    updated_ranking: bool
    accumulated_ranking: bool
    wants_query_similarity: bool
    wants_step_similarity: bool
    wants_layer_similarity: bool
    wants_refresh: bool


class Scratch(NamedTuple):
    """Room for intermediate results, shared by all layers.

    Attributes:
        normed: Float `(rows, hidden)`.
        projected: Float `(rows, all heads x head_dim)`: queries, keys, values before rotary embedding.
        query: Float `(rows, kv_heads, group, head_dim)`: after it.
        unit_query: Float `(rows, kv_heads, head_dim)`: its mean over the group.
        block: Float `(threads, group, BLOCK_TOKENS)`.
        highest: Float `(threads, units, group)`: each thread's part of the attention, as `attend_tokens` has it.
        total: The same.
        partial: Float `(threads, units, group, head_dim)`.
        set_logits: Float `(units, group, k)`, or `(units, group, 0)` if ranks are not updated.
        token_score: float32 `(threads, places)`.
        pooled: The same.
        found: int64 of the same shape.
        was_in: bool of the same shape, all False between kernels.
        attended: Float `(rows, kv_heads, group, head_dim)`: the attention.
        gate: Float `(rows, intermediate)`.
        up: The same.
    """

    normed: Array
    projected: Array
    query: Array
    unit_query: Array
    block: Array
    highest: Array
    total: Array
    partial: Array
    set_logits: Array
    token_score: Array
    pooled: Array
    found: Array
    was_in: Array
    attended: Array
    gate: Array
    up: Array
