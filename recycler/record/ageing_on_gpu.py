"""Ageing sets in one kernel on a GPU: what `recycler.record.aged_sets.age_together` does an age at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from policies import GroupPooling
from recycler.sets.recycled_set import RecycledSet

_LAST_RANK = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["rows", "tokens", "first", "n_ages", "n_columns"])
def _age(
    positions,
    scores,
    sizes,
    shares,
    fresh,
    n_fresh,
    columns,
    recovered_mass,
    overlap,
    rows,
    tokens,
    first,
    n_ages,
    n_columns,
    smallest,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    RANKS_ANEW: tl.constexpr,
    SCORE_KEPT: tl.constexpr,
    NEWCOMER: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Let the set of one head and row grow older; program `(head, row)`.

    Args:
        positions: int32 `(heads, rows, K)`: places, -1 in empty slots.
        scores: float32 of the same shape.
        sizes: int32 `(heads,)`: slots that each head's sets may use, the first ones.
        shares: `(heads, rows, tokens, GROUP)`: attention, query heads side by side, so that one read has them all.
        fresh: int8 `(heads, rows, tokens)`: which places the set that each row chooses holds.
        n_fresh: int32 `(heads, rows)`: how many.
        columns: int32 `(n_ages + 1,)`: where an age is written, or -1 - column where only row 0's set is.
        recovered_mass: float32 `(heads, rows, n_columns)`, as in `AgedSets`, like what follows.
        overlap: The same.
        n_ages: The oldest age.
        smallest: Least sum of a head's attention over a set by which it is divided.
        SLOTS: K, to the next power of 2.
        MEMBERS: The same for GROUP.
        RANKS_ANEW: Whether a step's attention ranks the set that it attended to.
        SCORE_KEPT: Share of its score that a token keeps then.
        NEWCOMER: Score of a token that arrives.
        MEAN: Whether a group is pooled by the mean, not the maximum.
    """
    head, source = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, member = tl.arange(0, SLOTS), tl.arange(0, MEMBERS)
    usable = slot < tl.load(sizes + head)
    at = (head * rows + source) * K + slot
    place = tl.load(positions + at, mask=slot < K, other=-1)
    score = tl.load(scores + at, mask=slot < K, other=0)
    for age in range(1, tl.minimum(n_ages, rows - 1 - source) + 1):
        row = source + age
        newest = first + row
        rank = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tl.maximum(place, 0).to(tl.int64)
        rank = tl.where((place < SINKS) | (place > newest - WINDOW), _LAST_RANK, rank)
        # Empty slots go first, and no two of the others are equal but those that stay.
        rank = tl.where(usable, tl.where(place < 0, slot - SLOTS, rank), _LAST_RANK)
        leaves = rank == tl.min(rank)
        place = tl.where(leaves, newest, place)
        score = tl.where(leaves, NEWCOMER, score)

        filled = place >= 0
        # Without a mask over members all of a token's are one load.
        is_there = filled[:, None] if MEMBERS == GROUP else filled[:, None] & (member < GROUP)[None, :]
        of_token = ((head * rows + row) * tokens + place) * GROUP
        share = tl.load(shares + of_token[:, None] + member[None, :], mask=is_there, other=0)
        total = tl.sum(share, axis=0)
        column = tl.load(columns + age)
        if (column >= 0) | (source == 0):
            column = tl.where(column >= 0, column, -1 - column)
            held = tl.load(fresh + (head * rows + row) * tokens + place, mask=filled, other=0)
            out = (head * rows + row) * n_columns + column
            tl.store(recovered_mass + out, tl.minimum(tl.sum(total) / GROUP, 1.0))
            share_held = tl.sum(held.to(tl.int32)).to(tl.float32) / tl.load(n_fresh + head * rows + row).to(tl.float32)
            tl.store(overlap + out, share_held)
        if RANKS_ANEW:
            over_set = share / tl.maximum(total, smallest)[None, :]
            latest = tl.sum(over_set, axis=1) / GROUP if MEAN else tl.max(over_set, axis=1)
            score = score * SCORE_KEPT + latest.to(tl.float32)


def age_in_one_kernel(
    chosen: RecycledSet, probabilities: Tensor, first: int, ages: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `recycler.record.aged_sets.age_sets`."""
    selection, device = chosen.selection, probabilities.device
    heads, group, rows, tokens = probabilities.shape
    k = chosen.positions.shape[-1]
    recovered_mass = probabilities.new_full((heads, rows, len(ages)), float("nan"))
    overlap = recovered_mass.clone()
    columns = np.searchsorted(ages, np.arange(ages[-1] + 1))
    columns = np.where(np.isin(np.arange(ages[-1] + 1), ages), columns, -1 - columns)
    sizes = torch.full((1,), k) if chosen.sizes is None else chosen.sizes.reshape(-1)
    kept = selection.score_kept
    if kept is None:
        # Nobody asks for a single head's.
        probabilities, group = probabilities.mean(1, keepdim=True), 1
    # What stands in for a GPU where there is none says that it is one.
    with torch.cuda.device(device) if probabilities.is_cuda and torch.cuda.is_available() else nullcontext():
        _age[(heads, rows)](
            chosen.positions.to(torch.int32).contiguous(),
            chosen.scores.contiguous(),
            sizes.to(device, torch.int32).expand(heads).contiguous(),
            probabilities.permute(0, 2, 3, 1).contiguous(),
            chosen.holds(tokens).contiguous().view(torch.int8),
            chosen.filled.sum(-1).to(torch.int32).contiguous(),
            torch.tensor(columns, dtype=torch.int32, device=device),
            recovered_mass,
            overlap,
            rows,
            tokens,
            first,
            ages[-1],
            len(ages),
            torch.finfo(probabilities.dtype).tiny,
            K=k,
            SLOTS=triton.next_power_of_2(k),
            GROUP=group,
            MEMBERS=triton.next_power_of_2(group),
            SINKS=selection.sinks,
            WINDOW=selection.window,
            RANKS_ANEW=kept is not None,
            SCORE_KEPT=0.0 if kept is None else kept,
            NEWCOMER=float("inf") if kept is None else 0.0,
            MEAN=selection.group == GroupPooling.MEAN,
            num_warps=8,
            # As the other ways round.
            enable_fp_fusion=False,
        )
    return recovered_mass, overlap
