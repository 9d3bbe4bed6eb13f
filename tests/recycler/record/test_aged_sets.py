"""Aged sets: who leaves at each age, and the weight on what is left."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies import Selection
from recycler.record.aged_sets import AgedSets, age_sets, age_together
from recycler.record.ageing_on_gpu import age_in_one_kernel
from recycler.sets.recycled_set import RecycledSet, select
from recycler.sets.scores import token_scores


def chosen_sets(weights: Tensor, first: int, selection: Selection) -> RecycledSet:
    """The set that each row of `(heads, group, rows, tokens)` chooses."""
    row_end = first + 1 + torch.arange(weights.shape[2], device=weights.device)[:, None]
    return select(token_scores(weights.transpose(1, 2), selection), selection, 0, row_end)


Situation = tuple[Tensor, Selection, int, list[int]]
WAYS = [age_sets, age_together]


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Causal weights `(1, group, rows, tokens)` with many ties, a selection, the first row's place, and ages."""
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    selection = Selection(
        k=sinks + max(window, 1) + draw(st.integers(0, 5)),
        sinks=sinks,
        window=window,
        pool_backward=draw(st.integers(0, 2)),
        pool_forward=draw(st.integers(0, 2)),
        group=draw(st.sampled_from(["max", "mean"])),
        ranking=draw(st.sampled_from(["last_full", "updated", "accumulated", "decayed"])),
        score_decay=0.5,
    )
    first, rows = draw(st.integers(0, 12)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Multiples of powers of two: their sums are exact, so that ties are ties however they are computed.
    weights = rng.choice([0.0, 0.25, 0.5, 1.0, 2.0], (1, draw(st.sampled_from([1, 2])), rows, first + rows))
    weights = np.tril(weights, first)
    # No row is without weight on its newest token.
    newest = np.arange(rows)
    weights[:, :, newest, first + newest] += 0.25
    ages = [1, *sorted(draw(st.sets(st.integers(2, 16))))]
    return torch.tensor(weights), selection, first, ages


@pytest.mark.parametrize("age", WAYS)
@given(situation=situations())
@settings(max_examples=200, deadline=None)
def test_aged_sets_hold_what_a_dictionary_holds(
    plain_set: Callable[..., Any], age: Callable[..., AgedSets], situation: Situation
) -> None:
    weights, selection, first, ages = situation
    rows = weights.shape[2]
    chosen = chosen_sets(weights, first, selection)
    members = chosen.holds(weights.shape[-1]).to(weights.dtype)
    found = age(chosen, weights, first, ages)
    expected = np.full((2, rows, len(ages)), np.nan)
    for source in range(rows):
        aged = plain_set(weights[0, :, source, : first + source + 1].numpy(), selection)
        for row in range(source + 1, rows):
            aged.admit(first + row)
            # At ages that are not asked for, the set of the first row alone is looked at.
            column = np.searchsorted(ages, row - source)
            row_weights = weights[0, :, row].numpy()
            if column < len(ages) and (row - source in ages or source == 0):
                fresh = members[0, row]
                # The weights here are no shares: their sum may be above 1, where it is cut.
                expected[0, row, column] = min(row_weights.mean(0)[aged.places].sum(), 1)
                expected[1, row, column] = float(fresh[aged.places].sum() / fresh.sum())
            over_set = row_weights[:, aged.places]
            aged.rescore(over_set / over_set.sum(-1, keepdims=True))
    np.testing.assert_allclose(found.recovered_mass[0], expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.overlap[0], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("age", WAYS)
@given(situation=situations(), more=st.lists(st.integers(0, 8), min_size=2, max_size=3))
@settings(max_examples=100, deadline=None)
def test_sets_of_different_sizes_age_as_each_does_alone(
    selection_of_unit: Callable[..., Selection], age: Callable[..., AgedSets], situation: Situation, more: list[int]
) -> None:
    weights, selection, first, ages = situation
    least = selection.sinks + max(selection.window, 1)
    sizes = tuple(least + extra for extra in more)
    selection = dataclasses.replace(selection, k=max(sizes), unit_k=(sizes,))
    weights = weights.repeat(len(sizes), 1, 1, 1)
    row_end = first + 1 + torch.arange(weights.shape[2])[:, None]
    scores = token_scores(weights.transpose(1, 2), selection)
    chosen = select(scores, selection, 0, row_end, torch.tensor(sizes)[:, None, None])
    found = age(chosen, weights, first, ages)
    for head in range(len(sizes)):
        of_unit, alone = selection_of_unit(selection, 0, head), weights[head : head + 1]
        expected = age(chosen_sets(alone, first, of_unit), alone, first, ages)
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[head : head + 1], its, rtol=0, atol=1e-12, equal_nan=True)


@given(situation=situations())
@settings(max_examples=25, deadline=None)
def test_on_a_gpu_one_kernel_ages_as_all_sets_do_together(situation: Situation) -> None:
    weights, selection, first, ages = situation
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = chosen_sets(weights.to(device), first, selection)
    found = age_in_one_kernel(chosen, weights.to(device), first, ages)
    expected = age_together(chosen_sets(weights, first, selection), weights, first, ages)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), its, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("age", WAYS)
@pytest.mark.parametrize("group", ["max", "mean"])
def test_head_that_attends_to_nothing_in_the_set_has_no_say(age: Callable[..., AgedSets], group: str) -> None:
    # In float32, a softmax with one huge logit is exactly 0 everywhere else.
    rows, first = 4, 9
    weights = torch.zeros(1, 2, rows, first + rows)
    weights[:, :, 0, 3:9] = 1 / 6
    weights[:, 0, 1:, 0] = 1
    weights[:, 1, 1:, 5:9] = torch.tensor([0.2, 0.4, 0.1, 0.3])
    selection = Selection(5, sinks=0, window=1, pool_forward=0, group=group, ranking="updated")
    found = age(chosen_sets(weights, first, selection), weights, first, [1, 2, 3])
    # The set of row 0 is 5 to 9, and 9, of which it sees nothing, leaves first. From then on the second head decides:
    # newcomers have no score and leave again, and 5 to 8 stay.
    of_row_0 = [found.recovered_mass[0, row, row - 1] for row in (1, 2, 3)]
    assert of_row_0 == pytest.approx([0.5, 0.5, 0.5])
