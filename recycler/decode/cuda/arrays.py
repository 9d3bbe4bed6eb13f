"""What the kernels work on, in named tuples: Triton passes each as its fields.

A *unit* is numbered `row * kv_heads + kv_head`; *as stored* is the model's own type. A kernel's parameter has the name
of its tuple, or of an array of it if the kernel needs no other. Kernels describe only what else they take, but for

    sizes                    int32 `(kv_heads,)`: most tokens of each head's sets
    n_prompt                 tokens of the prompt
    n_units, n_all_units     units of a layer, of all layers
    places                   places that there is room for, as many as the cache holds before it grows again
    KV_HEADS                 of a row
    GROUP                    query heads of a unit
    QUERIES                  tokens of a row that ask at once, the last of which is its newest; a unit's members are its
                             heads' queries, side by side by head
    HEAD_DIM                 a power of 2
    UNITS                    units of a layer, to the next power of 2
    K                        slots of a set
    CHUNK, CHUNKS            tokens of a chunk in the kernels that choose sets; chunks of all places; powers of 2
    SINKS, WINDOW            first and last tokens that stay in a set
    BACKWARD, FORWARD        pooling over tokens
    MEAN                     whether a group is pooled by the mean, not the maximum
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Cached(NamedTuple):
    """Which tokens are in the cache.

    Attributes:
        start: int32 `(rows,)`: place of each row's first token.
        n_own: int32 `(rows,)`: each row's tokens since the prompt, without this step's.
        going: int32 `(rows,)`: 1 for rows that take the step, 0 for others.
    """

    start: Tensor
    n_own: Tensor
    going: Tensor


class Cache(NamedTuple):
    """Where a layer's keys and values are, as stored.

    Attributes:
        prompt_key: `(rows or 1, kv_heads, n_prompt, head_dim)`.
        prompt_value: The same.
        prompt_row: Elements from one row of the prompt's part to the next; 0 if all rows share it.
        own: int64 `(2,)`: addresses of keys and values since the prompt, `(rows, kv_heads, room, head_dim)`.
        room: int32 `(1,)`.
    """

    prompt_key: Tensor
    prompt_value: Tensor
    prompt_row: int
    own: Tensor
    room: Tensor


class Sets(NamedTuple):
    """A layer's sets.

    Attributes:
        positions: int32 `(units, K)`: places of the sets' tokens, in the first slots.
        scores: float32 `(units, K)`: what they are ranked by.
        filled: int32 `(units,)`: tokens in each set.
    """

    positions: Tensor
    scores: Tensor
    filled: Tensor


class Queries(NamedTuple):
    """Mean queries of a layer's groups, float32 `(units, head_dim)`: those of the last full steps, and of the last."""

    full: Tensor
    last: Tensor


class Decisions(NamedTuple):
    """What a layer's policy is shown, what it decides, and what is counted.

    Attributes:
        signals: float64 `(signals, layers, units)`, at this layer, in the order of `SIGNALS`.
        given: int8 `(units,)`: decisions for this step, where they are not made by a kernel.
        by_keys: int8 `(units,)`: units that refresh by their keys alone.
        led: int32 `(rows,)`: 1 for rows that run full whatever the policy says.
        decided: int8 `(units,)`: decisions of the last step.
        overruled: int32 `(at least 1, layers, units)`, at this layer: how often wrappers overruled the policy, by
            reason.
        tokens_read: float64 `(units,)`: at the last step, as `Decoding` has it.
        all_tokens_read: float64 `(units,)`: since the prompt.
    """

    signals: Tensor
    given: Tensor
    by_keys: Tensor
    led: Tensor
    decided: Tensor
    overruled: Tensor
    tokens_read: Tensor
    all_tokens_read: Tensor


class Weights(NamedTuple):
    """Attention by token.

    Attributes:
        logits: float32 `(units, group, places)`, scaled: of a walk over the whole cache by place, of one over a set by
            slot.
        normaliser: float32 `(units, group)`: log of the sum of their exponentials.
    """

    logits: Tensor
    normaliser: Tensor


class Parts(NamedTuple):
    """Parts of the attention, `programs + units` of them.

    Attributes:
        highest: float32 `(parts, group)`: the largest logit.
        total: float32 `(parts, group)`: sum of exp(logit - highest).
        output: float32 `(parts, group, head_dim)`: sum of exp(logit - highest) x value.
    """

    highest: Tensor
    total: Tensor
    output: Tensor


class Search(NamedTuple):
    """Where new sets are looked for.

    Attributes:
        scores: float32 `(units, places)`: of all tokens.
        counts: int32 `(units, 2048)`, all 0 between steps: how often the scores' high bits occur.
        picked: int32 `(units, CHUNKS * CHUNK)`: places of candidates, of each chunk those above from its
            beginning on, and those that share the bits of the k-th best from its end on.
        n_picked: int32 `(units, 2, CHUNKS)`: how many.
        marks: int32 `(units, places)`, or of one token if nothing is measured: the last stamp of each token that was in
            a set.
    """

    scores: Tensor
    counts: Tensor
    picked: Tensor
    n_picked: Tensor
    marks: Tensor
