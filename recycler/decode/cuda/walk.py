"""Split-K decode attention: full units walk the whole cache, recycled ones their list of places."""

from __future__ import annotations

import triton
import triton.language as tl

from recycler.decode.cuda.own_tokens import own_tokens
from recycler.decode.cuda.shares import RECYCLED, program_of, share_of_program, tiles_of_units

# The largest logit of no tokens.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def row_of_query(unit, member, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """Where a member's query is in the model's order, `(rows, queries, kv_heads, group)`."""
    token = unit // KV_HEADS * QUERIES + member % QUERIES
    return (token * KV_HEADS + unit % KV_HEADS) * GROUP + member // QUERIES


@triton.jit(do_not_specialize=["n_units", "n_prompt", "places"])
def walk(
    query,
    cached,
    cache,
    sets,
    modes,
    logits,
    parts,
    scaling,
    n_units,
    n_prompt,
    places,
    K: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    READS_VALUES: tl.constexpr,
    KEEPS_SET_LOGITS: tl.constexpr,
):
    """A program's share of a layer's attention (online softmax, arXiv 1805.02867; split-K as in flash decoding).

    Of every unit in its share it leaves one part, in slot `program + unit`: shares and units are laid along the same
    tiles, so that no two parts fall into one slot, and those of a unit lie side by side.

    Args:
        query: As stored, `(rows, queries, kv_heads, group, head_dim)`.
        modes: int8 `(units,)`; with several queries, none is recycled.
        logits: Of `Weights`: gets those of full units, by place; if KEEPS_SET_LOGITS, those of recycled ones by slot.
            Nothing, with several queries.
        scaling: Factor on query x key.
        ROWS: A power of 2 from the members on that `tl.dot` takes; what is beyond them is zeros.
        TILE: Tokens of a tile.
        READS_VALUES: False for a walk of keys-only refreshes.
        KEEPS_SET_LOGITS: Whether sets are ranked anew by them.
    """
    MEMBERS: tl.constexpr = GROUP * QUERIES
    own_key, own_value = own_tokens(cache.own, cache.prompt_key.dtype.element_ty)
    own_room = tl.load(cache.room)
    tiles = tiles_of_units(modes, sets.filled, cached, n_units, n_prompt, KV_HEADS, UNITS, TILE)
    ends = tl.cumsum(tiles)
    program = tl.program_id(0)
    tile, last = share_of_program(tiles)

    member = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, TILE)
    while tile < last:
        unit = tl.sum((ends <= tile).to(tl.int32))
        unit_end = tl.sum(tl.where(tl.arange(0, UNITS) == unit, ends, 0))
        unit_tiles = tl.sum(tl.where(tl.arange(0, UNITS) == unit, tiles, 0))
        stop = tl.minimum(last, unit_end)
        unit_first = unit_end - unit_tiles

        row, head = (unit // KV_HEADS).to(tl.int64), unit % KV_HEADS
        first = tl.load(cached.start + row)
        end = n_prompt + tl.load(cached.n_own + row) + 1
        recycled = tl.load(modes + unit) == RECYCLED
        n_listed = tl.where(recycled, tl.load(sets.filled + unit), 0)
        n_tokens = tl.where(recycled, n_listed, end - first)
        n_kept = n_tokens if KEEPS_SET_LOGITS else n_tokens - n_listed
        prompt_base = row * cache.prompt_row + head.to(tl.int64) * n_prompt * HEAD_DIM
        own_base = (unit.to(tl.int64) * own_room - n_prompt) * HEAD_DIM
        q = tl.load(
            query + row_of_query(unit, member, KV_HEADS, GROUP, QUERIES)[:, None] * HEAD_DIM + channel[None, :],
            mask=member[:, None] < MEMBERS,
            other=0,
        )
        best = tl.full((ROWS,), NOTHING, tl.float32)
        weight_sum = tl.zeros((ROWS,), tl.float32)
        output = tl.zeros((ROWS, HEAD_DIM), tl.float32)
        # The next tile's places are read a tile ahead: else the copies of keys and values would wait for them.
        slot = (tile - unit_first) * TILE + in_tile
        listed = tl.load(sets.positions + unit * K + slot, mask=slot < n_listed, other=0)
        for t in range(tile - unit_first, stop - unit_first):
            slot = t * TILE + in_tile
            seen = slot < n_tokens
            place = tl.where(recycled, listed, first + slot)
            in_prompt = (place < n_prompt)[:, None]
            offset = place.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
            keys = tl.where(in_prompt, cache.prompt_key + prompt_base + offset, own_key + own_base + offset)
            k = tl.load(keys, mask=seen[:, None], other=0)
            logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            if QUERIES == 1:
                to = (unit.to(tl.int64) * GROUP + member[:, None]) * places + tl.where(recycled, slot, place)[None, :]
                tl.store(logits + to, logit, mask=(member[:, None] < GROUP) & (slot < n_kept)[None, :])
                logit = tl.where(seen[None, :], logit, NOTHING)
            else:
                last_seen = end - QUERIES + member % QUERIES
                logit = tl.where(seen[None, :] & (place[None, :] <= last_seen[:, None]), logit, NOTHING)
            better = tl.maximum(best, tl.max(logit, 1))
            shrink = tl.exp(best - better)
            # What is not seen weighs exp(-1e30), which is 0: of one query's tile some token is; of several queries',
            # a part in which one sees nothing has -1e30 for its largest logit, and weighs 0 beside the others.
            weight = tl.exp(logit - better[:, None])
            weight_sum = weight_sum * shrink + tl.sum(weight, 1)
            if READS_VALUES:
                values = tl.where(in_prompt, cache.prompt_value + prompt_base + offset, own_value + own_base + offset)
                v = tl.load(values, mask=seen[:, None], other=0)
                output = output * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            best = better
            listed = tl.load(sets.positions + unit * K + slot + TILE, mask=slot + TILE < n_listed, other=0)
        part = (program + unit) * MEMBERS + member
        tl.store(parts.highest + part, best, mask=member < MEMBERS)
        tl.store(parts.total + part, weight_sum, mask=member < MEMBERS)
        if READS_VALUES:
            to = parts.output + part[:, None] * HEAD_DIM + channel[None, :]
            tl.store(to, output, mask=member[:, None] < MEMBERS)
        tile = stop


@triton.jit(do_not_specialize=["n_units", "n_prompt", "n_programs"])
def merge(
    cached,
    filled,
    queries,
    modes,
    parts,
    normaliser,
    attended,
    n_units,
    n_prompt,
    n_programs,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    UNITS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    READS_VALUES: tl.constexpr,
):
    """Bring the parts of one member of one unit together; program `(unit, member)`.

    Units that score the whole cache have their full query brought up to date: not before the walk, as others may look
    at it until every unit of the layer has decided. Where several queries asked, that is left to others.

    Args:
        filled: Of `Sets`.
        modes: As for `walk`.
        normaliser: Of `Weights`, of all members.
        attended: As stored, `(rows, queries, kv_heads, group, head_dim)`: gets the attention.
        n_programs: Of the walk.
        TILE: The same.
        PARTS: Parts looked at in one go.
        READS_VALUES: As in the walk.
    """
    MEMBERS: tl.constexpr = GROUP * QUERIES
    unit, member = tl.program_id(0), tl.program_id(1)
    tiles = tiles_of_units(modes, filled, cached, n_units, n_prompt, KV_HEADS, UNITS, TILE)
    here = tl.arange(0, UNITS) == unit
    unit_tiles = tl.sum(tl.where(here, tiles, 0))
    if unit_tiles == 0:
        return
    n_tiles = tl.sum(tiles)
    unit_end = tl.sum(tl.where(here, tl.cumsum(tiles), 0))
    n_programs = tl.minimum(n_programs, n_tiles)
    first_part = program_of(unit_end - unit_tiles, n_tiles, n_programs) + unit
    last_part = program_of(unit_end - 1, n_tiles, n_programs) + unit

    channel = tl.arange(0, HEAD_DIM)
    best = tl.full((), NOTHING, tl.float32)
    weight_sum = tl.zeros((), tl.float32)
    output = tl.zeros((HEAD_DIM,), tl.float32)
    for low in range(first_part, last_part + 1, PARTS):
        part = low + tl.arange(0, PARTS)
        exists = part <= last_part
        top = tl.load(parts.highest + part * MEMBERS + member, mask=exists, other=NOTHING)
        better = tl.maximum(best, tl.max(top))
        weight = tl.where(exists, tl.exp(top - better), 0)
        shrink = tl.exp(best - better)
        total = tl.load(parts.total + part * MEMBERS + member, mask=exists, other=0)
        weight_sum = weight_sum * shrink + tl.sum(weight * total)
        if READS_VALUES:
            sums = parts.output + (part * MEMBERS + member)[:, None] * HEAD_DIM + channel[None, :]
            output = output * shrink + tl.sum(weight[:, None] * tl.load(sums, mask=exists[:, None], other=0), 0)
        best = better
    tl.store(normaliser + unit * MEMBERS + member, best + tl.log(weight_sum))
    if READS_VALUES:
        at = row_of_query(unit, member, KV_HEADS, GROUP, QUERIES)
        tl.store(attended + at * HEAD_DIM + channel, (output / weight_sum).to(attended.dtype.element_ty))
    if QUERIES == 1:
        mode = tl.load(modes + unit)
        if (member == 0) & (mode != RECYCLED):
            tl.store(queries.full + unit * HEAD_DIM + channel, tl.load(queries.last + unit * HEAD_DIM + channel))
