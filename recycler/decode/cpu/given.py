"""Queries, keys and values that the model's own modules computed: what kernels begin from instead of `project`."""

from __future__ import annotations

from recycler.decode.cpu.arrays import Array, Cache, Fed, Rules, Scratch, Units
from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.dense import measure_similarities


@kernel(fastmath=True)
def take_in(
    query: Array,
    key: Array,
    value: Array,
    cache: Cache,
    fed: Fed,
    units: Units,
    signals: Array,
    rules: Rules,
    scratch: Scratch,
) -> None:
    """Keep a step's queries, put its keys and values into the cache, and measure similarities.

    Args:
        query: Float `(rows, kv_heads, group, head_dim)`, after rotary embedding.
        key: As stored, `(rows, kv_heads, head_dim)`.
        value: The same.
        cache: As for `project`, like what follows.
        fed: As there.
        units: As there.
        signals: As there.
        rules: As there.
        scratch: As there.
    """
    rows, kv_heads, group, head_dim = query.shape
    for row in range(rows):
        of_row, place = fed.row[row], fed.own[row]
        for head in range(kv_heads):
            for d in range(head_dim):
                total = query.dtype.type(0)
                for member in range(group):
                    scratch.query[row, head, member, d] = query[row, head, member, d]
                    total += query[row, head, member, d]
                scratch.unit_query[row, head, d] = total / group
                cache.own_key[of_row, head, place, d] = key[row, head, d]
                cache.own_value[of_row, head, place, d] = value[row, head, d]
    measure_similarities(units, signals, rules, scratch)
