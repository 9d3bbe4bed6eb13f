"""What the kernels work on, in named tuples: numba passes each as its fields.

*Float* is float64 in a float64 model and float32 otherwise; *as stored* is the model's own type, bfloat16 as its 16
bits in a uint16. Optional arrays are empty where there are none. A *unit* is numbered `row * kv_heads + kv_head`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies import SIGNALS

Array = np.ndarray
# A layer's signals are a float64 array `(rows, signals, kv_heads)` in the order of `policies.SIGNALS`: a row's numbers
# lie side by side, as its policy may be one of its own.
QUERY_SIMILARITY, STEP_SIMILARITY, LAYER_SIMILARITY, REFRESH_MASS, REFRESH_OVERLAP = (
    # NumPy's numbers: for Python's numba compiles a function once for each that it is called with.
    np.int64(SIGNALS.index(name))
    for name in ("query_similarity", "step_similarity", "layer_similarity", "refresh_mass", "refresh_overlap")
)


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


class Products(NamedTuple):
    """What becomes of query x key; see `recycler.sets.scores.Scoring`.

    Attributes:
        scaling: Factor on it.
        softcap: Logits become `softcap * tanh(logits / softcap)`; 0 for as they are.
        sink_logits: Float `(kv_heads, group)`: of a sink that takes part of the output; or `(0, 0)`.
    """

    scaling: float
    softcap: float
    sink_logits: Array


class Cache(NamedTuple):
    """All keys and values of a layer, as stored, in order of place.

    The prompt's part is `(rows or 1, kv_heads, tokens, head_dim)`, with one row if all rows share it. The rest is
    `(rows, kv_heads, room, head_dim)`: every row's own tokens since, and room for more.
    """

    prompt_key: Array
    prompt_value: Array
    own_key: Array
    own_value: Array


class Fed(NamedTuple):
    """Where the tokens that are fed go: int64 `(tokens,)` each.

    At a step there is one for each row of the batch, in order; what a verification feeds has several of one row.

    Attributes:
        row: Row of the cache.
        own: Place among the row's own tokens.
    """

    row: Array
    own: Array


class Units(NamedTuple):
    """The state of a layer's units: their sets, and their queries.

    Attributes:
        set_key: `(rows, kv_heads, k, head_dim)`, as stored: a compact copy of each set.
        set_value: The same.
        positions: int64 `(rows, kv_heads, k)`: places of the sets' tokens, in the slots of the copies.
        scores: float32 of the same shape: what they are ranked by; infinite for tokens that came after the last full
            step.
        sizes: int64 `(kv_heads,)`: most tokens of each head's sets; k is the largest of the model.
        filled: int64 `(rows, kv_heads)`: tokens in each set, in the first slots.
        stale: bool `(rows, kv_heads)`: the set is chosen, and its copy is not made yet.
        by_keys: bool `(rows, kv_heads)`: full decisions are keys-only refreshes.
        setless: bool `(rows, kv_heads)`: units that run full steps for ever, and keep no sets.
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
    by_keys: Array
    setless: Array
    full_query: Array
    last_query: Array


class Rules(NamedTuple):
    """A selection and what the policy wants to be measured, as plain numbers; `score_kept` is below 0 for none."""

    sinks: int
    window: int
    pool_backward: int
    pool_forward: int
    group_mean: bool
    score_kept: float
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
        modes: int8 `(2, rows, kv_heads)`: of the walk of keys-only refreshes, and of the attention.
        block: Float `(threads, group, BLOCK_TOKENS)`.
        logits: Float `(units, group, places)`, scaled: of a walk over the whole cache by place, of one over a set by
            slot.
        normaliser: Float `(units, group)`: log of the sum of their exponentials.
        highest: Float `(threads, units, group)`: each thread's part of the attention, as `attend_tokens` has it.
        total: The same.
        partial: Float `(threads, units, group, head_dim)`.
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
    modes: Array
    block: Array
    logits: Array
    normaliser: Array
    highest: Array
    total: Array
    partial: Array
    token_score: Array
    pooled: Array
    found: Array
    was_in: Array
    attended: Array
    gate: Array
    up: Array
