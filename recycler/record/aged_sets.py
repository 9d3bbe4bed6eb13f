"""What sets chosen at earlier steps would have kept, for every step and many ages.

A set follows from the step that chose it and from the attention of full attention since, so each is aged as the decoder
ages one: a token arrives, one leaves, and where the selection asks for it the step's attention over the set ranks the
set anew. On a CPU compiled code takes one set after another, on a GPU a kernel takes each; where neither is to be had,
all sets of a layer grow older together.

Shapes: `heads` are the KV heads of a layer, `rows` consecutive query positions, of which row i sits at place
`first + i` of the cache. Row i is also the source of the set chosen at row i; row 0 is the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from policies import GroupPooling
from recycler.model.threads import threads_of_torch
from recycler.record.ageing_kernel import age_each
from recycler.sets.recycled_set import RecycledSet
from recycler.sets.scores import group_scores
from traces.ages import last_recorded

# A kernel has a set in registers.
_MOST_SLOTS_OF_A_KERNEL = 8192


class AgedSets(NamedTuple):
    """Sets of all rows at some ages.

    At `[r, i]` of both is row r with the set that was chosen `ages[i]` rows before. The entry of the first age above r
    is that of the set of row 0, and those beyond are NaN.

    Attributes:
        recovered_mass: `(heads, rows, ages)`, in [0, 1]: attention of the row on the set, mean over the group.
        overlap: The same shape, in [0, 1]: share of the set that the row would choose which the aged set holds.
    """

    recovered_mass: Tensor
    overlap: Tensor


def age_sets(
    chosen: RecycledSet, probabilities: Tensor, first: int, ages: Sequence[int], *, apart: int = 1
) -> AgedSets:
    """Age the sets of all rows, or of some.

    Args:
        chosen: Sets of all sources, `(heads, rows, k)`.
        probabilities: `(heads, group, rows, tokens)`, full attention.
        first: Place of row 0.
        ages: Which ages to look at, rising from 1.
        apart: On a CPU only sets of every so many rows are aged, beginning with row 0; what is said of others is NaN.
    """
    if probabilities.device.type == "cpu":
        return _age_one_by_one(chosen, probabilities, first, ages, apart)
    fits = chosen.positions.shape[-1] <= _MOST_SLOTS_OF_A_KERNEL
    # torch for ROCm calls its devices cuda.
    if probabilities.device.type == "cuda" and torch.version.hip is None and fits:
        try:
            from recycler.record.ageing_on_gpu import age_in_one_kernel
        except ImportError:
            pass
        else:
            return AgedSets(*age_in_one_kernel(chosen, probabilities, first, ages))
    return age_together(chosen, probabilities, first, ages)


def _age_one_by_one(
    chosen: RecycledSet, probabilities: Tensor, first: int, ages: Sequence[int], apart: int
) -> AgedSets:
    heads, _, rows, _ = probabilities.shape
    found = probabilities.new_full((2, heads, rows, len(ages)), float("nan"))
    selection = chosen.selection
    threads_of_torch()
    sizes = chosen.positions.shape[-1] if chosen.sizes is None else chosen.sizes.reshape(-1).numpy()
    age_each(
        probabilities.contiguous().numpy(),
        chosen.positions.contiguous().numpy(),
        chosen.scores.contiguous().numpy(),
        np.broadcast_to(sizes, heads).astype(np.int64),
        first,
        selection.sinks,
        selection.window,
        -1.0 if selection.score_kept is None else selection.score_kept,
        selection.group == GroupPooling.MEAN,
        np.array(ages, dtype=np.int64),
        last_recorded(ages),
        apart,
        found[0].numpy(),
        found[1].numpy(),
    )
    # Sums of parts of a distribution: rounding may leave [0, 1] by an ulp.
    return AgedSets(found[0].clamp_(0, 1), found[1])


def age_together(chosen: RecycledSet, probabilities: Tensor, first: int, ages: Sequence[int]) -> AgedSets:
    """The same in steps of one age, on any device; what the compiled code is compared with."""
    selection, tokens = chosen.selection, probabilities.shape[-1]
    heads, rows, _ = chosen.positions.shape
    recovered_mass = probabilities.new_full((heads, rows, len(ages)), float("nan"))
    overlap = recovered_mass.clone()
    fresh, n_fresh = chosen.holds(tokens), chosen.filled.sum(-1)
    columns = {age: column for column, age in enumerate(ages)}
    aging = chosen
    for age in range(1, min(ages[-1], rows - 1) + 1):
        alive = rows - age
        place = first + age + torch.arange(alive, device=probabilities.device)[:, None]
        aging = RecycledSet(aging.positions[:, :alive], aging.scores[:, :alive], selection, chosen.sizes)
        aging.admit(place, 0)
        over_sets = _over_sets(aging, probabilities[:, :, age:])
        # At an age that is not looked at, only the prompt's set is.
        column = columns.get(age)
        sources = 1 if column is None else alive
        column = int(np.searchsorted(ages, age)) if column is None else column
        rows_of = slice(age, age + sources)
        recovered_mass[:, rows_of, column] = over_sets[:, :sources].sum(-1).mean(-1).clamp(0, 1)
        held = fresh[:, rows_of].gather(-1, aging.positions[:, :sources].clamp(min=0)) & aging.filled[:, :sources]
        overlap[:, rows_of, column] = held.sum(-1) / n_fresh[:, rows_of].to(overlap.dtype)
        if selection.score_kept is not None:
            # A head that attends to nothing in the set, as far as its precision tells, scores nothing.
            total = over_sets.sum(-1, keepdim=True).clamp(min=torch.finfo(over_sets.dtype).tiny)
            latest = group_scores(over_sets / total, selection.group).float()
            aging.scores = aging.scores * selection.score_kept + latest
    return AgedSets(recovered_mass, overlap)


def _over_sets(sets: RecycledSet, probabilities: Tensor) -> Tensor:
    """Attention to the slots of sets: `(heads, group, rows, tokens)` to `(heads, rows, group, k)`."""
    slots = sets.positions[:, None].expand(-1, probabilities.shape[1], -1, -1)
    return probabilities.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0).transpose(1, 2)
