"""What sets chosen at earlier steps would have kept, for every step and every age at once.

A set changes in a regular way as it grows older: at each age one token arrives, and one, known beforehand, leaves. So
the mass on the set of age a is the mass on the set as chosen, plus that on the a newest tokens, minus that on the a
tokens that left. The first is a matrix product of attention with selection masks, over a band of ages; the others are
sums of single entries.

Shapes: `heads` are the KV heads of a layer, `rows` consecutive query positions, of which row i sits at place
`first + i` of the cache. Row i is also the source of the set chosen at row i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from policies import Ranking, Selection
from recycler.sets.recycled_set import EMPTY, STAYS, RecycledSet, ranks
from recycler.sets.scores import group_scores


def evictions(chosen: RecycledSet, probabilities: Tensor, first: int, max_age: int) -> Tensor:
    """Which token leaves each set at each age.

    Args:
        chosen: Sets of all sources, `(heads, rows, k)`.
        probabilities: `(heads, group, rows, tokens)`, full attention.
        first: Place of row 0.
        max_age: Oldest age.

    Returns:
        int64 `(heads, rows, max_age)`: place of the token that the set of source i loses when it reaches age a, at
        index `[i, a - 1]`; -1 if none does, or if row i + a does not exist.
    """
    if chosen.selection.ranking == Ranking.LAST_FULL:
        left = _evictions_by_last_full(chosen, first, max_age)
    else:
        left = _evictions_step_by_step(chosen, probabilities, first, max_age)
    rows = left.shape[1]
    ages = torch.arange(1, max_age + 1, device=left.device)
    beyond_last_row = torch.arange(rows, device=left.device)[:, None] + ages >= rows
    return left.masked_fill_(beyond_last_row, -1)


def _evictions_by_last_full(chosen: RecycledSet, first: int, max_age: int) -> Tensor:
    """What `RecycledSet.admit` would evict, in one pass over the set per age instead of a dozen.

    Scores do not change, so ranks are computed once. Tokens of the window wait until they fall out of it; when all
    scored tokens are gone, the oldest of the new ones leaves.
    """
    selection = chosen.selection
    heads, rows, k = chosen.positions.shape
    source = first + torch.arange(rows, device=chosen.positions.device)[:, None]
    # One slot more, always out of the running, stands for window tokens that are not there.
    positions = pad(chosen.positions, (0, 1), value=-1)
    rank = ranks(chosen.scores, chosen.positions).masked_fill_(chosen.positions < selection.sinks, STAYS)
    rank = chosen.close(rank.masked_fill_(~chosen.filled, EMPTY))
    # Not `pad`: it takes its value as a float, which cannot hold this one.
    rank = torch.cat([rank, rank.new_full((heads, rows, 1), STAYS)], dim=-1)
    released_at = positions - (source - selection.window)
    waits = (released_at > 0) & (positions >= 0)
    slot_released_at = positions.new_full((heads, rows, selection.window + 1), k)
    slots = torch.arange(k + 1, device=positions.device).expand_as(positions)
    slot_released_at.scatter_(-1, released_at.masked_fill(~waits, 0), slots)
    running = rank.masked_fill(waits, STAYS)
    # After a prompt shorter than the sinks, the first of the new tokens are sinks.
    oldest_new = (source + 1).clamp(min=selection.sinks)
    n_new_gone = positions.new_zeros((heads, rows, 1))
    left = positions.new_empty((heads, rows, max_age))
    for age in range(1, max_age + 1):
        if age <= selection.window:
            released = slot_released_at[..., age, None]
            running.scatter_(-1, released, rank.gather(-1, released))
        lowest, slot = running.min(-1, keepdim=True)
        all_gone = lowest == STAYS
        left[..., age - 1] = torch.where(all_gone, oldest_new + n_new_gone, positions.gather(-1, slot))[..., 0]
        n_new_gone += all_gone
        running.scatter_(-1, slot, STAYS)
    return left


def _evictions_step_by_step(chosen: RecycledSet, probabilities: Tensor, first: int, max_age: int) -> Tensor:
    """Age all sets together as the decoder ages one, re-ranking each by the attention of every step over it."""
    selection = chosen.selection
    heads, rows, _ = chosen.positions.shape
    left = chosen.positions.new_full((heads, rows, max_age), -1)
    aging = chosen
    for age in range(1, min(max_age, rows - 1) + 1):
        alive = rows - age
        place = first + age + torch.arange(alive, device=left.device)[:, None]
        aging = RecycledSet(aging.positions[:, :alive], aging.scores[:, :alive], selection, chosen.sizes)
        left[:, :alive, age - 1] = aging.admit(place, 0)[..., 0]
        aging.scores = _scores_over_sets(aging, probabilities[:, :, age:], selection)
    return left


def mass_by_age(weights: Tensor, members: Tensor, left: Tensor, first: int) -> Tensor:
    """Weight that each row gives to the sets of the rows before it.

    Args:
        weights: `(heads, rows, tokens)`, for instance attention; 0 for tokens that a row cannot see.
        members: The same shape and type: 1 where a token is in the set chosen at the row, else 0.
        left: What `evictions` returned.
        first: Place of row 0.

    Returns:
        `(heads, rows, max_age)`: at `[j, a - 1]` the weight of row j on the set of row j - a at age a; NaN where
        j - a < 0.
    """
    rows = weights.shape[1]
    max_age = left.shape[-1]
    ages = torch.arange(1, max_age + 1, device=weights.device)
    mass = band(weights, members, max_age)
    newest = first + torch.arange(rows, device=weights.device)[:, None] - (ages - 1)
    mass += weights.gather(-1, newest.clamp(min=0).expand(weights.shape[0], -1, -1)).cumsum(-1)
    for age in range(1, min(max_age, rows - 1) + 1):
        gone = left[:, : rows - age, :age]
        lost = weights[:, age:].gather(-1, gone.clamp(min=0)).masked_fill_(gone < 0, 0)
        mass[:, age:, age - 1] -= lost.sum(-1)
    return mass


def band(left: Tensor, right: Tensor, max_age: int) -> Tensor:
    """The products of each row of `left` with the `max_age` rows of `right` before it.

    Args:
        left: `(heads, rows, width)`.
        right: The same shape.
        max_age: Width of the band.

    Returns:
        `(heads, rows, max_age)`: at `[j, a - 1]` the product of `left[j]` and `right[j - a]`; NaN where j - a < 0.
    """
    heads, rows, _ = left.shape
    result = left.new_full((heads, rows, max_age), float("nan"))
    ages = torch.arange(1, max_age + 1, device=left.device)
    # Blocks as wide as the band: at most a third of each product lies outside it.
    size = max(max_age, 64)
    for begin in range(0, rows - 1, size):
        end = min(begin + size, rows - 1)
        last = min(end + max_age, rows)
        product = left[:, begin + 1 : last] @ right[:, begin:end].transpose(-1, -2)
        source = torch.arange(begin + 1, last, device=left.device)[:, None] - ages - begin
        inside = (source >= 0) & (source < end - begin)
        found = product.gather(-1, source.clamp(0, end - begin - 1).expand(heads, -1, -1))
        rows_of_block = result[:, begin + 1 : last]
        result[:, begin + 1 : last] = torch.where(inside, found, rows_of_block)
    return result


def _scores_over_sets(sets: RecycledSet, probabilities: Tensor, selection: Selection) -> Tensor:
    """Scores by a step's attention over the set alone; `(heads, group, rows, tokens)` to `(heads, rows, k)`."""
    slots = sets.positions[:, None].expand(-1, probabilities.shape[1], -1, -1)
    mass = probabilities.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0)
    # A head that attends to nothing in the set, as far as its precision tells, scores nothing.
    over_set = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return group_scores(over_set.transpose(1, 2), selection.group).float()
