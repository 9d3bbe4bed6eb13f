"""Sets of one unit at a time: what `recycler.sets.recycled_set` chooses, keeps and ranks, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from policies import Selection
from recycler.decode.cpu import sets as helpers
from recycler.sets.recycled_set import RecycledSet, select
from recycler.sets.scores import group_scores as torch_group_scores
from recycler.sets.scores import token_scores


def in_kernel(helper: Any) -> Any:
    """A kernel that calls the helper: Python has no way into it."""
    return njit(lambda *arguments: helper(*arguments))


choose, admit, pool, group_scores = map(in_kernel, (helpers.choose, helpers.admit, helpers.pool, helpers.group_scores))
some_examples = settings(max_examples=200, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    sinks, window = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    k = sinks + max(window, 1) + draw(st.integers(0, 20))
    return Selection(k, sinks, window, draw(st.integers(0, 4)), draw(st.integers(0, 7)))


@st.composite
def rows_of_scores(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Scores of a cache with some room behind its end, and where the row's tokens start and end."""
    start, n, room = draw(st.integers(0, 9)), draw(st.integers(1, 120)), draw(st.integers(0, 5))
    # Few levels make many ties, also of 0; levels that share their high bits need all digits of a radix select.
    levels = draw(st.sampled_from([1, 2, 7, 10**6]))
    low, high = draw(st.sampled_from([(0.0, 1.0), (0.5, 0.5 + 2**-15), (1e-42, 1e-38)]))
    rng = np.random.default_rng(draw(seeds))
    grid = np.linspace(low, high, levels, dtype=np.float32)
    scores = grid[rng.integers(0, levels, start + n + room)]
    return np.where(rng.random(len(scores)) < 0.1, np.float32(0), scores), start, start + n


def chosen(scores: np.ndarray, start: int, end: int, selection: Selection) -> tuple[np.ndarray, np.ndarray, int]:
    positions, kept = np.full(selection.k, -7, dtype=np.int64), np.full(selection.k, np.nan, dtype=np.float32)
    found = np.empty(len(scores), dtype=np.int64)
    n = choose(scores, start, end, selection.sinks, selection.window, found, positions, kept)
    return positions, kept, n


def by_place(recycled: RecycledSet) -> dict[int, float]:
    filled = recycled.filled
    return dict(zip(recycled.positions[filled].tolist(), recycled.scores[filled].tolist(), strict=True))


class TestChoose:
    @some_examples
    @given(row=rows_of_scores(), selection=selections())
    def test_it_chooses_what_select_does(self, row: tuple[np.ndarray, int, int], selection: Selection) -> None:
        scores, start, end = row
        positions, kept, n = chosen(scores, start, end, selection)
        expected = by_place(select(torch.from_numpy(scores), selection, start, end))
        assert n == min(selection.k, end - start) == len(expected)
        assert dict(zip(positions[:n].tolist(), kept[:n].tolist(), strict=True)) == expected
        assert (np.diff(positions[:n]) > 0).all()
        # What is not filled is not touched.
        assert (positions[n:] == -7).all()

    def test_the_later_of_two_equal_scores_is_taken(self) -> None:
        scores = np.array([9, 3, 3, 3, 1, 3, 9], dtype=np.float32)
        assert chosen(scores, 0, 7, Selection(4, 1, 1))[0].tolist() == [0, 3, 5, 6]

    def test_a_row_no_longer_than_the_set_is_taken_whole(self) -> None:
        scores = np.arange(9, dtype=np.float32)
        assert chosen(scores, 3, 8, Selection(5, 2, 3))[0].tolist() == [3, 4, 5, 6, 7]

    def test_a_set_of_sinks_and_window_takes_nothing_else(self) -> None:
        scores = np.array([0, 0, 9, 9, 9, 0, 0], dtype=np.float32)
        assert chosen(scores, 0, 7, Selection(4, 2, 2))[0].tolist() == [0, 1, 5, 6]


class TestAdmit:
    @some_examples
    @given(row=rows_of_scores(), selection=selections(), n_rescored=st.sampled_from([0, 3, 11]), seed=seeds)
    def test_a_long_run_of_admits_keeps_the_set_of_recycled_set(
        self, row: tuple[np.ndarray, int, int], selection: Selection, n_rescored: int, seed: int
    ) -> None:
        scores, start, end = row
        positions, kept, n = chosen(scores, start, end, selection)
        plain = select(torch.from_numpy(scores), selection, start, end)
        rng = np.random.default_rng(seed)
        for position in range(end, end + 60):
            if n_rescored and position % n_rescored == 0:
                # As ranking by the latest step does; with ties.
                table = rng.integers(0, 4, position).astype(np.float32) / 8
                kept[:n] = table[positions[:n]]
                plain.scores = torch.from_numpy(table[plain.positions.clamp(min=0).numpy()])
            slot = admit(position, start, selection.sinks, selection.window, n, positions, kept)
            n = max(n, slot + 1)
            plain.admit(position, start)
            assert positions[slot] == position
            assert dict(zip(positions[:n].tolist(), kept[:n].tolist(), strict=True)) == by_place(plain)

    def test_the_older_of_two_equal_scores_leaves(self) -> None:
        positions = np.array([5, 3, 4, 6], dtype=np.int64)
        scores = np.array([2, 1, 1, 2], dtype=np.float32)
        assert admit(7, 0, 0, 0, 4, positions, scores) == 1
        assert positions.tolist() == [5, 7, 4, 6]
        assert scores.tolist() == [2, np.inf, 1, 2]

    def test_sinks_and_window_stay_though_their_scores_are_lowest(self) -> None:
        positions = np.array([2, 3, 8, 9], dtype=np.int64)
        scores = np.array([0, 5, 0, 0], dtype=np.float32)
        assert admit(10, 2, 1, 2, 4, positions, scores) == 2
        assert admit(11, 2, 1, 2, 4, positions, scores) == 3
        assert admit(12, 2, 1, 2, 4, positions, scores) == 1
        assert sorted(positions.tolist()) == [2, 10, 11, 12]


class TestScores:
    @some_examples
    @given(row=rows_of_scores(), selection=selections())
    def test_pooling_is_that_of_token_scores(self, row: tuple[np.ndarray, int, int], selection: Selection) -> None:
        scores, start, end = row
        pooled = np.full_like(scores, -1)
        pool(scores, start, end, selection.pool_backward, selection.pool_forward, pooled)
        # Padding has no attention, and what is behind the end does not exist.
        attention = torch.from_numpy(scores[:end]).clone()
        attention[:start] = 0
        expected = token_scores(attention[None], selection).numpy()
        np.testing.assert_array_equal(pooled[start:end], expected[start:])
        assert (pooled[:start] == -1).all()
        assert (pooled[end:] == -1).all()

    @pytest.mark.parametrize("mean", [False, True])
    # float32 rounds logit - normaliser of size 30, and its exponential is good to 4e-7; results are float32 always.
    @pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2.5e-6), (np.float64, 3e-7)])
    @settings(max_examples=40, deadline=None)
    @given(group=st.integers(1, 8), start=st.integers(0, 9), n=st.integers(1, 120), seed=seeds)
    def test_group_scores_are_those_of_the_attention(
        self, dtype: type, rtol: float, mean: bool, group: int, start: int, n: int, seed: int
    ) -> None:
        logits = np.random.default_rng(seed).uniform(-10, 10, (group, start + n + 3)).astype(dtype)
        seen = torch.from_numpy(logits[:, start : start + n].astype(np.float64))
        normaliser = seen.logsumexp(-1).numpy().astype(dtype)
        scores = np.full(logits.shape[1], -1, dtype=np.float32)
        group_scores(logits, normaliser, start, start + n, mean, scores)
        attention = (seen - torch.from_numpy(normaliser.astype(np.float64))[:, None]).exp()
        expected = torch_group_scores(attention, "mean" if mean else "max").numpy()
        np.testing.assert_allclose(scores[start : start + n], expected, rtol=rtol, atol=0)
        assert (scores[:start] == -1).all()
        assert (scores[start + n :] == -1).all()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_a_logit_rounded_above_its_normaliser_is_all_of_the_attention_and_not_more(self, dtype: type) -> None:
        scores = np.empty(2, dtype=np.float32)
        logits = np.array([[5 + 1e-5, -1e4]], dtype=dtype)
        group_scores(logits, np.array([5], dtype=dtype), 0, 2, False, scores)
        assert scores[0] == 1
        assert 0 <= scores[1] < 1e-37
