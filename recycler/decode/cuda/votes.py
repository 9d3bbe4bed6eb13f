"""Several tokens of a row that are read at once: their keys and values go in, and their attention votes."""

from __future__ import annotations

import triton
import triton.language as tl

from recycler.decode.cuda.own_tokens import own_tokens
from recycler.decode.cuda.prepare import mean_query
from recycler.decode.cuda.shares import share_of_program, tiles_of_units
from recycler.decode.cuda.walk import row_of_query

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def take_in(
    query,
    key,
    value,
    cached,
    cache,
    kept_queries,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Write tokens to the cache's own part, and keep their queries; a program per token and KV head.

    Args:
        query: As stored, `(rows, queries, kv_heads, group, head_dim)`, after rotary embedding.
        key: As stored, `(rows, queries, kv_heads, head_dim)`.
        value: The same.
        kept_queries: float32 of the same shape: gets the mean queries of the groups.
    """
    at, head = tl.program_id(0), tl.program_id(0) % KV_HEADS
    token = at // KV_HEADS
    row = token // QUERIES
    if tl.load(cached.going + row) == 0:
        return
    channel = tl.arange(0, HEAD_DIM)
    own = tl.load(cached.n_own + row) + 1 - QUERIES + token % QUERIES
    own_key, own_value = own_tokens(cache.own, key.dtype.element_ty)
    to = ((row * KV_HEADS + head).to(tl.int64) * tl.load(cache.room) + own) * HEAD_DIM + channel
    tl.store(own_key + to, tl.load(key + at * HEAD_DIM + channel))
    tl.store(own_value + to, tl.load(value + at * HEAD_DIM + channel))
    tl.store(kept_queries + at * HEAD_DIM + channel, mean_query(query, at, GROUP, HEAD_DIM))


@triton.jit(do_not_specialize=["n_units", "n_prompt", "places"])
def vote(
    query,
    n_asking,
    cached,
    cache,
    filled,
    modes,
    normaliser,
    votes,
    scaling,
    n_units,
    n_prompt,
    places,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    UNITS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Sum the attention of several queries to each token, and pool it over the heads of the group.

    Keys are read again: their logits would be as many bytes, and memory that a walk has to share with the cache.

    Args:
        query: As for `walk`.
        n_asking: int32 `(rows,)`: how many of a row's queries vote, the first ones.
        modes: The same.
        normaliser: What `merge` made of that walk.
        votes: float32 `(units, places)`: gets the sums.
        scaling: Factor on query x key.
        HEADS: A power of 2 from GROUP on.
        TOKENS: A power of 2 from QUERIES on, so that `tl.dot` takes HEADS x TOKENS columns: one of a row's threads has
            several of them, and sums without asking other warps.
        TILE: Tokens of a tile.
    """
    MEMBERS: tl.constexpr = GROUP * QUERIES
    own_key, _ = own_tokens(cache.own, cache.prompt_key.dtype.element_ty)
    own_room = tl.load(cache.room)
    tiles = tiles_of_units(modes, filled, cached, n_units, n_prompt, KV_HEADS, UNITS, TILE)
    ends = tl.cumsum(tiles)
    tile, last = share_of_program(tiles)

    head_of, token_of = tl.arange(0, HEADS * TOKENS) // TOKENS, tl.arange(0, HEADS * TOKENS) % TOKENS
    asks = (head_of < GROUP) & (token_of < QUERIES)
    member = head_of * QUERIES + token_of
    channel = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, TILE)
    while tile < last:
        unit = tl.sum((ends <= tile).to(tl.int32))
        unit_end = tl.sum(tl.where(tl.arange(0, UNITS) == unit, ends, 0))
        unit_first = unit_end - tl.sum(tl.where(tl.arange(0, UNITS) == unit, tiles, 0))
        stop = tl.minimum(last, unit_end)

        row, head = (unit // KV_HEADS).to(tl.int64), unit % KV_HEADS
        first = tl.load(cached.start + row)
        end = n_prompt + tl.load(cached.n_own + row) + 1
        prompt_base = row * cache.prompt_row + head.to(tl.int64) * n_prompt * HEAD_DIM
        own_base = (unit.to(tl.int64) * own_room - n_prompt) * HEAD_DIM
        q = tl.load(
            query + row_of_query(unit, member, KV_HEADS, GROUP, QUERIES)[:, None] * HEAD_DIM + channel[None, :],
            mask=asks[:, None],
            other=0,
        )
        total = tl.load(normaliser + unit * MEMBERS + member, mask=asks, other=0) * LOG2_E
        # Those that have no vote see nothing.
        last_seen = tl.where(asks & (token_of < tl.load(n_asking + row)), end - QUERIES + token_of, -1)
        for t in range(tile - unit_first, stop - unit_first):
            place = first + t * TILE + in_tile
            seen = place < end
            offset = place.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
            in_prompt = (place < n_prompt)[:, None]
            keys = tl.where(in_prompt, cache.prompt_key + prompt_base + offset, own_key + own_base + offset)
            k = tl.load(keys, mask=seen[:, None], other=0)
            logit = tl.dot(k, tl.trans(q), input_precision="ieee") * (scaling * LOG2_E)
            attention = tl.where(place[:, None] <= last_seen[None, :], tl.exp2(logit - total[None, :]), 0.0)
            summed = tl.sum(attention.reshape(TILE, HEADS, TOKENS), 2)
            pooled = tl.sum(summed, 1) / GROUP if MEAN else tl.max(summed, 1)
            tl.store(votes + unit.to(tl.int64) * places + place, pooled, mask=seen)
        tile = stop
