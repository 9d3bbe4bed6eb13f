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
    probabilities,
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
        probabilities: `(heads, GROUP, rows, tokens)`.
        fresh: int8 `(heads, rows, tokens)`: which places the set that each row chooses holds.
        n_fresh: int32 `(heads, rows)`: how many.
        columns: int32 `(n_ages + 1,)`: where an age is written, or -1 - column where only row 0's set is.
        recovered_mass: float32 `(heads, rows, n_columns)`, as in `AgedSets`, like what follows.
        overlap: The same.
        n_ages: The oldest age.
        smallest: Least sum of a head's attention over a set by which it is divided.
        SLOTS: K, to the next power of 2.
        RANKS_ANEW: Whether a step's attention ranks the set that it attended to.
        SCORE_KEPT: Share of its score that a token keeps then.
        NEWCOMER: Score of a token that arrives.
        MEAN: Whether a group is pooled by the mean, not the maximum.
    """
    head, source = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    usable = slot < tl.load(sizes + head)
    at = (head * rows + source) * K + slot
    place = tl.load(positions + at, mask=slot < K, other=-1)
    score = tl.load(scores + at, mask=slot < K, other=0)
    for age in range(1, tl.minimum(n_ages, rows - 1 - source) + 1):
        row = source + age
        newest = first + row
        rank = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tl.maximum(place, 0).to(tl.int64)
        rank = tl.where((place < SINKS) | (place > newest - WINDOW), _LAST_RANK, rank)
        rank = tl.where(usable, tl.where(place < 0, -1, rank), _LAST_RANK)
        to = tl.min(tl.where(rank == tl.min(rank), slot, SLOTS))
        place = tl.where(slot == to, newest, place)
        score = tl.where(slot == to, NEWCOMER, score)

        filled = place >= 0
        mass = tl.zeros((), probabilities.dtype.element_ty)
        latest = tl.zeros((SLOTS,), probabilities.dtype.element_ty)
        for member in tl.static_range(GROUP):
            of_row = probabilities + ((head * GROUP + member) * rows + row) * tokens
            weight = tl.load(of_row + place, mask=filled, other=0)
            total = tl.sum(weight)
            mass += total
            if RANKS_ANEW:
                share = weight / tl.maximum(total, smallest)
                latest = latest + share if MEAN else tl.maximum(latest, share)
        column = tl.load(columns + age)
        if (column >= 0) | (source == 0):
            column = tl.where(column >= 0, column, -1 - column)
            held = tl.load(fresh + (head * rows + row) * tokens + place, mask=filled, other=0)
            out = (head * rows + row) * n_columns + column
            tl.store(recovered_mass + out, tl.minimum(mass / GROUP, 1.0))
            share_held = tl.sum(held.to(tl.int32)).to(tl.float32) / tl.load(n_fresh + head * rows + row).to(tl.float32)
            tl.store(overlap + out, share_held)
        if RANKS_ANEW:
            score = score * SCORE_KEPT + (latest / GROUP if MEAN else latest).to(tl.float32)


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
    with torch.cuda.device(device) if torch.cuda.is_available() else nullcontext():
        _age[(heads, rows)](
            chosen.positions.to(torch.int32).contiguous(),
            chosen.scores.contiguous(),
            sizes.to(device, torch.int32).expand(heads).contiguous(),
            probabilities.contiguous(),
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
