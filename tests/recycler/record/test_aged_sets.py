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
from recycler.sets.aged_sets import band, evictions, mass_by_age
from recycler.sets.recycled_set import RecycledSet, select
from recycler.sets.scores import token_scores


def chosen_sets(weights: Tensor, first: int, selection: Selection) -> RecycledSet:
    """The set that each row of `(heads, group, rows, tokens)` chooses."""
    row_end = first + 1 + torch.arange(weights.shape[2])[:, None]
    return select(token_scores(weights.transpose(1, 2), selection), selection, 0, row_end)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, Selection, int, int]:
    """Causal weights `(1, group, rows, tokens)` with many ties, a selection, the first row's place, and a max_age."""
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    selection = Selection(
        k=sinks + max(window, 1) + draw(st.integers(0, 5)),
        sinks=sinks,
        window=window,
        pool_backward=draw(st.integers(0, 2)),
        pool_forward=draw(st.integers(0, 2)),
        group=draw(st.sampled_from(["max", "mean"])),
        ranking=draw(st.sampled_from(["last_full", "updated"])),
    )
    first, rows = draw(st.integers(0, 12)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Multiples of powers of two: their sums are exact, so that ties are ties however they are computed.
    weights = rng.choice([0.0, 0.25, 0.5, 1.0, 2.0], (1, draw(st.sampled_from([1, 2])), rows, first + rows))
    weights = np.tril(weights, first)
    # No row is without weight on its newest token.
    newest = np.arange(rows)
    weights[:, :, newest, first + newest] += 0.25
    return torch.tensor(weights), selection, first, draw(st.integers(1, 16))


@given(situations())
@settings(max_examples=400, deadline=None)
def test_sets_lose_at_each_age_what_a_dictionary_loses(
    plain_set: Callable[..., Any], situation: tuple[Tensor, Selection, int, int]
) -> None:
    weights, selection, first, max_age = situation
    rows = weights.shape[2]
    chosen = chosen_sets(weights, first, selection)
    left = evictions(chosen, weights, first, max_age)
    members = chosen.holds(weights.shape[-1]).to(weights.dtype)
    mass = mass_by_age(weights.mean(1), members, left, first)
    overlap = mass_by_age(members, members, left, first)
    assert left.shape == mass.shape == overlap.shape == (1, rows, max_age)
    for source in range(rows):
        aged = plain_set(weights[0, :, source, : first + source + 1].numpy(), selection)
        for age in range(1, max_age + 1):
            row = source + age
            if row >= rows:
                assert left[0, source, age - 1] == -1
                assert torch.isnan(mass[0, source, rows - source - 1 : max_age][source + 1 :]).all()
                continue
            assert int(left[0, source, age - 1]) == aged.admit(first + row)
            row_weights = weights[0, :, row].numpy()
            assert float(mass[0, row, age - 1]) == pytest.approx(row_weights.mean(0)[aged.places].sum(), abs=1e-12)
            assert float(overlap[0, row, age - 1]) == float(members[0, row][aged.places].sum())
            over_set = row_weights[:, aged.places]
            aged.rescore(over_set / over_set.sum(-1, keepdims=True))


@given(situations(), st.lists(st.integers(0, 8), min_size=2, max_size=3))
@settings(max_examples=150, deadline=None)
def test_sets_of_different_sizes_age_as_each_does_alone(
    selection_of_unit: Callable[..., Selection], situation: tuple[Tensor, Selection, int, int], more: list[int]
) -> None:
    weights, selection, first, max_age = situation
    least = selection.sinks + max(selection.window, 1)
    sizes = tuple(least + extra for extra in more)
    selection = dataclasses.replace(selection, k=max(sizes), unit_k=(sizes,))
    weights = weights.repeat(len(sizes), 1, 1, 1)
    row_end = first + 1 + torch.arange(weights.shape[2])[:, None]
    scores = token_scores(weights.transpose(1, 2), selection)
    chosen = select(scores, selection, 0, row_end, torch.tensor(sizes)[:, None, None])
    left = evictions(chosen, weights, first, max_age)
    for head in range(len(sizes)):
        of_unit, alone = selection_of_unit(selection, 0, head), weights[head : head + 1]
        expected = evictions(chosen_sets(alone, first, of_unit), alone, first, max_age)
        assert torch.equal(left[head : head + 1], expected)


@given(rows=st.integers(1, 220), max_age=st.integers(1, 130), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_band_is_the_products_with_the_rows_before(rows: int, max_age: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.rand(2, 2, rows, 3, generator=generator, dtype=torch.float64)
    found = band(left, right, max_age)
    whole = left @ right.transpose(-1, -2)
    assert found.shape == (2, rows, max_age)
    row = torch.arange(rows)[:, None]
    source = row - torch.arange(1, max_age + 1)
    expected = whole.gather(-1, source.clamp(min=0).expand(2, -1, -1)).masked_fill(source < 0, float("nan"))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("group", ["max", "mean"])
def test_head_that_attends_to_nothing_in_the_set_has_no_say(group: str) -> None:
    # In float32, a softmax with one huge logit is exactly 0 everywhere else.
    rows, first = 3, 9
    weights = torch.zeros(1, 2, rows, first + rows)
    weights[:, :, 0, 3:9] = 1 / 6
    weights[:, 0, 1:, 0] = 1
    weights[:, 1, 1:, 5:9] = torch.tensor([0.2, 0.4, 0.1, 0.3])
    selection = Selection(5, sinks=0, window=1, pool_forward=0, group=group, ranking="updated")
    left = evictions(chosen_sets(weights, first, selection), weights, first, 2)
    # The set is 5 to 9, and 9 has no score. At age 2 the second head decides, and 10 has none.
    assert left[0, 0].tolist() == [9, 10]
