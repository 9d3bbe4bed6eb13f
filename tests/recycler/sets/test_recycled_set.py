"""Sets: hand-made examples, then agreement with a dictionary that does the same token by token."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies import Selection
from recycler.sets.recycled_set import RecycledSet, select, unit_sizes
from recycler.sets.scores import group_scores, token_scores


def scores_of(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def places(recycled: RecycledSet) -> list[int]:
    """The tokens of a lone unit."""
    return sorted(recycled.positions[recycled.filled].tolist())


def test_group_is_pooled_by_its_best_head_or_by_the_mean() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.25, 0.75]])
    assert group_scores(weights, "max").tolist() == [0.5, 0.25, 0.75]
    assert group_scores(weights, "mean").tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(
    ("backward", "forward", "expected"),
    [
        (0, 0, [0, 0, 9, 0, 0, 5, 0]),
        (2, 0, [9, 9, 9, 5, 5, 5, 0]),
        (0, 2, [0, 0, 9, 9, 9, 5, 5]),
        (1, 1, [0, 9, 9, 9, 5, 5, 5]),
        (9, 0, [9, 9, 9, 5, 5, 5, 0]),
        (0, 9, [0, 0, 9, 9, 9, 9, 9]),
    ],
)
def test_pooling_takes_tokens_before_or_after_an_attended_one(backward: int, forward: int, expected: list[int]) -> None:
    weights = torch.tensor([[0, 0, 9, 0, 0, 0, 0], [0, 0, 0, 0, 0, 5, 0]], dtype=torch.float32)
    selection = Selection(8, 0, 0, pool_backward=backward, pool_forward=forward)
    assert token_scores(weights, selection).tolist() == expected


def test_leading_axes_are_pooled_apart() -> None:
    weights = torch.rand(2, 3, 4, 9, dtype=torch.float64).transpose(0, 1)
    selection = Selection(8, 0, 0, pool_backward=1, pool_forward=2, group="mean")
    together = token_scores(weights, selection)
    assert together.shape == (3, 2, 9)
    for i in range(3):
        for j in range(2):
            assert torch.equal(together[i, j], token_scores(weights[i, j], selection))


def test_set_is_sinks_and_window_and_the_best_of_the_rest() -> None:
    scores = scores_of(0, 0, 1, 5, 3, 4, 2, 0, 0)
    assert places(select(scores, Selection(6, sinks=2, window=2), 0, 9)) == [0, 1, 3, 5, 7, 8]


def test_sinks_and_window_need_no_score() -> None:
    scores = scores_of(0, 9, 9, 9, 0)
    assert places(select(scores, Selection(2, sinks=1, window=1), 0, 5)) == [0, 4]


def test_of_equal_scores_the_later_token_is_taken() -> None:
    assert places(select(scores_of(1, 1, 1, 1, 1, 1), Selection(3, sinks=1, window=0), 0, 6)) == [0, 4, 5]


def test_fewer_tokens_than_k_are_all_taken() -> None:
    recycled = select(scores_of(1, 0, 2), Selection(5, sinks=1, window=1), 0, 3)
    assert places(recycled) == [0, 1, 2]
    assert recycled.positions.shape == recycled.scores.shape == (1, 5)


def test_padding_before_the_start_and_places_after_the_end_are_never_taken() -> None:
    scores = scores_of(9, 9, 9, 0, 5, 0, 0, 0, 9)
    assert places(select(scores, Selection(4, sinks=1, window=1), 3, 8)) == [3, 4, 6, 7]
    assert places(select(scores, Selection(8, sinks=1, window=1), 3, 8)) == [3, 4, 5, 6, 7]


def test_rows_start_where_their_padding_ends() -> None:
    scores = torch.ones(2, 3, 6)
    recycled = select(scores, Selection(2, sinks=1, window=1), torch.tensor([0, 4])[:, None, None], 6)
    assert recycled.positions.sort(-1).values.tolist() == [[[0, 5]] * 3, [[4, 5]] * 3]


def test_set_remembers_the_score_of_each_token() -> None:
    recycled = select(scores_of(4, 1, 3, 2), Selection(3, sinks=0, window=1), 0, 4)
    assert dict(zip(recycled.positions[0].tolist(), recycled.scores[0].tolist(), strict=True)) == {0: 4, 2: 3, 3: 2}


def admitted(scores: Tensor, selection: Selection, n_new: int, start: int = 0) -> tuple[list[int], RecycledSet]:
    """Who leaves as tokens arrive."""
    n_tokens = scores.shape[-1]
    recycled = select(scores, selection, start, n_tokens)
    return [int(recycled.admit(n_tokens + i, start)) for i in range(n_new)], recycled


def test_lowest_score_leaves_first_and_new_tokens_last() -> None:
    left, recycled = admitted(scores_of(5, 1, 4, 2, 3), Selection(4, sinks=0, window=0), 6)
    # 1 was never in; 5, 6, ... have no score.
    assert left == [3, 4, 2, 0, 5, 6]
    assert places(recycled) == [7, 8, 9, 10]


def test_sinks_never_leave() -> None:
    left, recycled = admitted(scores_of(0, 0, 9, 8, 7), Selection(4, sinks=2, window=1), 4)
    assert left == [4, 2, 5, 6]
    assert places(recycled) == [0, 1, 7, 8]


def test_window_slides_and_what_it_leaves_behind_is_ranked_by_its_score() -> None:
    left, recycled = admitted(scores_of(5, 4, 3, 1, 2), Selection(4, sinks=0, window=2), 3)
    # At 5 the window is 4, 5: token 3 with score 1 is free to go. At 6 it is 5, 6, and 4 with score 2 goes.
    assert left == [3, 4, 1]
    assert places(recycled) == [0, 5, 6, 7]


def test_of_equal_scores_the_older_token_leaves() -> None:
    left, _ = admitted(scores_of(1, 1, 1, 1), Selection(4, sinks=1, window=1), 4)
    assert left == [1, 2, 3, 4]


def test_empty_slots_fill_before_anyone_leaves() -> None:
    left, recycled = admitted(scores_of(1, 2), Selection(4, sinks=0, window=0), 3)
    assert left == [-1, -1, 0]
    assert places(recycled) == [1, 2, 3, 4]


def test_tokens_within_the_sinks_of_a_short_prompt_stay() -> None:
    left, recycled = admitted(scores_of(0, 0, 1), Selection(4, sinks=3, window=1), 3, start=2)
    assert left == [-1, -1, -1]
    assert places(recycled) == [2, 3, 4, 5]
    assert int(recycled.admit(6, 2)) == 5


def test_holds_marks_the_places_of_each_set() -> None:
    recycled = RecycledSet(torch.tensor([[2, -1], [0, 3]]), torch.zeros(2, 2), Selection(2, 0, 0))
    assert recycled.holds(4).tolist() == [[False, False, True, False], [True, False, False, True]]


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, Selection, int, int]:
    """Attention `(group, tokens)` with many ties, a selection, padding, and a number of tokens to come."""
    sinks, window = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    selection = Selection(
        k=sinks + max(window, 1) + draw(st.integers(0, 6)),
        sinks=sinks,
        window=window,
        pool_backward=draw(st.integers(0, 3)),
        pool_forward=draw(st.integers(0, 3)),
        group=draw(st.sampled_from(["max", "mean"])),
    )
    start, n_tokens = draw(st.integers(0, 3)), draw(st.integers(1, 14))
    score = st.sampled_from([0.0, 1e-45, 1e-30, 0.25, 0.5, 1.0])
    row = st.lists(score, min_size=n_tokens, max_size=n_tokens)
    weights = np.array(draw(st.lists(row, min_size=1, max_size=3)), dtype=np.float32)
    return np.pad(weights, ((0, 0), (start, 0))), selection, start, draw(st.integers(0, 12))


@given(situations())
@settings(max_examples=300, deadline=None)
def test_set_holds_at_most_k_tokens_and_always_sinks_window_and_the_newest(
    situation: tuple[np.ndarray, Selection, int, int],
) -> None:
    weights, selection, start, n_new = situation
    end = weights.shape[1]
    recycled = select(token_scores(torch.tensor(weights), selection), selection, start, end)
    for newest in range(end - 1, end + n_new):
        if newest >= end:
            recycled.admit(newest, start)
        held = places(recycled)
        assert len(held) == len(set(held)) == min(selection.k, newest + 1 - start)
        sinks = range(start, min(start + selection.sinks, newest + 1))
        window = range(max(start, newest + 1 - selection.window), newest + 1)
        # With no window, the newest token of the prompt has to earn its place; later ones do not.
        arrived = {newest} if newest >= end else set()
        assert {*sinks, *window} | arrived <= set(held) <= set(range(start, newest + 1))


@given(situations())
@settings(max_examples=300, deadline=None)
def test_sets_do_what_a_dictionary_does(
    plain_set: Callable[..., object], situation: tuple[np.ndarray, Selection, int, int]
) -> None:
    weights, selection, start, n_new = situation
    end = weights.shape[1]
    expected = plain_set(weights, selection, start)
    recycled = select(token_scores(torch.tensor(weights), selection), selection, start, end)
    assert places(recycled) == expected.places
    for newest in range(end, end + n_new):
        assert int(recycled.admit(newest, start)) == expected.admit(newest)
        assert places(recycled) == expected.places


@given(st.lists(situations(), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_units_choose_apart(several: list[tuple[np.ndarray, Selection, int, int]]) -> None:
    selection = several[0][1]
    tokens = max(weights.shape[1] for weights, *_ in several)
    rows = [np.pad(weights.max(0), (tokens - weights.shape[1], 0)) for weights, *_ in several]
    starts = [tokens - weights.shape[1] for weights, *_ in several]
    start = torch.tensor(starts)[:, None]
    together = select(torch.tensor(np.array(rows)), selection, start, tokens)
    alone = [select(torch.tensor(row)[None], selection, first, tokens) for row, first in zip(rows, starts, strict=True)]
    for newest in range(tokens, tokens + 4):
        left = together.admit(newest, start)
        assert left[:, 0].tolist() == [
            int(recycled.admit(newest, first)) for recycled, first in zip(alone, starts, strict=True)
        ]


def test_each_unit_has_its_row_of_the_table() -> None:
    selection = Selection(8, 1, 2, unit_k=((4, 12), (6, 10), (3, 5)))
    sizes = unit_sizes(selection, 1, torch.device("cpu"))
    assert sizes is not None
    assert sizes.tolist() == [[6], [10]]
    assert unit_sizes(Selection(8, 1, 2), 1, torch.device("cpu")) is None


def test_sets_of_different_sizes_are_chosen_side_by_side() -> None:
    scores = torch.tensor([0, 0, 1, 5, 3, 4, 2, 0, 0]).float().expand(3, -1)
    selection = Selection(6, sinks=1, window=2, unit_k=((3, 5, 8),))
    recycled = select(scores, selection, 0, 9, torch.tensor([[3], [5], [8]]))
    held = [sorted(row[row >= 0].tolist()) for row in recycled.positions]
    assert held == [[0, 7, 8], [0, 3, 5, 7, 8], [0, 2, 3, 4, 5, 6, 7, 8]]
    assert recycled.positions.shape == recycled.scores.shape == (3, 8)


@st.composite
def sized_situations(draw: st.DrawFn) -> tuple[np.ndarray, Selection, int, int]:
    """A situation with attention `(units, group, tokens)`, and a size for each of the units."""
    weights, selection, start, n_new = draw(situations())
    least = selection.sinks + max(selection.window, 1)
    sizes = draw(st.lists(st.integers(least, least + 8), min_size=2, max_size=4))
    score = st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0])
    row = st.lists(score, min_size=weights.shape[1] - start, max_size=weights.shape[1] - start)
    units = [np.pad(np.array(draw(row), dtype=np.float32), (start, 0))[None] for _ in sizes]
    k = max(least, -(-sum(sizes) // len(sizes)))
    return np.stack(units), dataclasses.replace(selection, k=k, unit_k=(tuple(sizes),)), start, n_new


@given(sized_situations())
@settings(max_examples=200, deadline=None)
def test_no_set_ever_holds_more_than_its_size_and_each_does_what_it_does_alone(
    plain_set: Callable[..., object],
    selection_of_unit: Callable[..., Selection],
    situation: tuple[np.ndarray, Selection, int, int],
) -> None:
    weights, selection, start, n_new = situation
    n_units, _, end = weights.shape
    sizes = unit_sizes(selection, 0, torch.device("cpu"))
    recycled = select(token_scores(torch.tensor(weights), selection), selection, start, end, sizes)
    alone = [plain_set(weights[unit], selection_of_unit(selection, 0, unit), start) for unit in range(n_units)]
    for newest in range(end - 1, end + n_new):
        if newest >= end:
            left = recycled.admit(newest, start)
            assert left[:, 0].tolist() == [one.admit(newest) for one in alone]
        for unit, size in enumerate(selection.unit_k[0]):
            held = recycled.positions[unit][recycled.filled[unit]].tolist()
            assert sorted(held) == alone[unit].places
            assert len(held) == min(size, newest + 1 - start)
            assert not recycled.filled[unit, size:].any()


@given(sized_situations())
@settings(max_examples=100, deadline=None)
def test_a_smaller_set_is_what_k_of_its_size_would_choose_and_the_beginning_of_a_larger_one(
    selection_of_unit: Callable[..., Selection], situation: tuple[np.ndarray, Selection, int, int]
) -> None:
    weights, selection, start, _ = situation
    n_units, _, end = weights.shape
    same = torch.tensor(weights[:1]).expand(n_units, -1, -1)
    scores = token_scores(same, selection)
    recycled = select(scores, selection, start, end, unit_sizes(selection, 0, torch.device("cpu")))
    held = []
    for unit in range(n_units):
        of_unit = selection_of_unit(selection, 0, unit)
        held.append(set(recycled.positions[unit][recycled.filled[unit]].tolist()))
        assert held[-1] == set(places(select(scores[:1], of_unit, start, end)))
    by_size = sorted(held, key=len)
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(by_size))


@given(situations())
@settings(max_examples=100, deadline=None)
def test_a_table_of_one_size_is_k(situation: tuple[np.ndarray, Selection, int, int]) -> None:
    weights, selection, start, n_new = situation
    end = weights.shape[1]
    scores = token_scores(torch.tensor(weights), selection).expand(2, -1)
    table = dataclasses.replace(selection, unit_k=((selection.k,) * 2,))
    sized = select(scores, table, start, end, unit_sizes(table, 0, torch.device("cpu")))
    plain = select(scores, selection, start, end)
    for newest in range(end, end + n_new + 1):
        for unit in range(2):
            one, other = (dict(zip(*pair, strict=True)) for pair in (slots(sized, unit), slots(plain, unit)))
            assert one == other
        assert torch.equal(sized.admit(newest, start), plain.admit(newest, start))


def slots(recycled: RecycledSet, unit: int) -> tuple[list[int], list[float]]:
    """Places of a unit's set, and their scores."""
    filled = recycled.filled[unit]
    return recycled.positions[unit][filled].tolist(), recycled.scores[unit][filled].tolist()


def test_slots_beyond_a_sets_size_are_closed() -> None:
    recycled = RecycledSet(torch.zeros(2, 3), torch.zeros(2, 3), Selection(2, 0, 0), torch.tensor([[1], [3]]))
    highest = torch.iinfo(torch.int64).max
    assert recycled.close(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[0, highest, highest], [0, 0, 0]]
    recycled.sizes = None
    assert recycled.close(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[0, 0, 0], [0, 0, 0]]
