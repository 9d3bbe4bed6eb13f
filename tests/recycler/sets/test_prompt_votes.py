"""Votes of a prompt's queries against the softmax written out query by query."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recycler.sets import prompt_votes
from recycler.sets.prompt_votes import PromptVotes
from recycler.sets.scores import Scoring

ROWS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 2, 4
SCORING = Scoring(0.7)
PADDING = (0, 2, 5)


def drawn(n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Query `(rows, kv_heads, group, tokens, head_dim)` and key `(rows, kv_heads, tokens, head_dim)`."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(ROWS, KV_HEADS, GROUP, n_tokens, HEAD_DIM, generator=generator, dtype=torch.float64)
    return query, torch.randn(ROWS, KV_HEADS, n_tokens, HEAD_DIM, generator=generator, dtype=torch.float64)


def visible_after(padding: Iterable[int], n_tokens: int) -> Tensor:
    return torch.arange(n_tokens) >= torch.tensor(list(padding))[:, None]


def written_out(query: Tensor, key: Tensor, n_queries: int | None, padding: tuple[int, ...] = (0, 0, 0)) -> np.ndarray:
    """One softmax per voting query, in plain numpy."""
    q, k = query.numpy(), key.numpy()
    n_tokens = k.shape[2]
    votes = np.zeros((*q.shape[:3], n_tokens))
    first = 0 if n_queries is None else max(0, n_tokens - n_queries)
    for row, kv_head, member in np.ndindex(*q.shape[:3]):
        start = padding[row]
        for place in range(max(first, start), n_tokens):
            logits = SCORING.scaling * k[row, kv_head, start : place + 1] @ q[row, kv_head, member, place]
            weights = np.exp(logits - logits.max())
            votes[row, kv_head, member, start : place + 1] += weights / weights.sum()
    return votes


def see_in_chunks(
    voting: PromptVotes, query: Tensor, key: Tensor, ends: Iterable[int], visible: Tensor | None = None
) -> Tensor:
    begin, votes = 0, torch.empty(0)
    for end in ends:
        seen = None if visible is None else visible[:, :end]
        votes = voting.see(query[..., begin:end, :], key[:, :, :end], seen, SCORING)
        begin = end
    return votes


@pytest.mark.parametrize("n_queries", [1, 3, 9, 40, None])
def test_votes_are_the_sum_of_each_voting_querys_causal_softmax(n_queries: int | None) -> None:
    query, key = drawn(9)
    votes = PromptVotes(n_queries).see(query, key, None, SCORING)
    np.testing.assert_allclose(votes, written_out(query, key, n_queries), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [1, 3, 5])
def test_each_query_has_one_vote_in_all(n_queries: int) -> None:
    votes = PromptVotes(n_queries).see(*drawn(9), None, SCORING)
    np.testing.assert_allclose(votes.sum(-1), n_queries, rtol=1e-12)


@settings(deadline=None)
@given(
    n_tokens=st.integers(1, 14),
    n_queries=st.one_of(st.none(), st.integers(1, 16)),
    cuts=st.sets(st.integers(1, 13)),
    padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_votes_do_not_depend_on_how_the_prompt_is_cut(
    n_tokens: int, n_queries: int | None, cuts: set[int], padded: bool, seed: int
) -> None:
    query, key = drawn(n_tokens, seed)
    padding = tuple(min(width, n_tokens - 1) for width in PADDING) if padded else (0, 0, 0)
    ends = [*sorted(cut for cut in cuts if cut < n_tokens), n_tokens]
    votes = see_in_chunks(
        PromptVotes(n_queries), query, key, ends, visible_after(padding, n_tokens) if padded else None
    )
    np.testing.assert_allclose(votes, written_out(query, key, n_queries, padding), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [2, None])
def test_votes_after_every_chunk_are_those_of_the_prompt_so_far(n_queries: int | None) -> None:
    query, key = drawn(9)
    voting = PromptVotes(n_queries)
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        votes = voting.see(query[..., begin:end, :], key[:, :, :end], None, SCORING)
        expected = written_out(query[..., :end, :], key[:, :, :end], n_queries)
        np.testing.assert_allclose(votes, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [3, 7, None])
def test_padding_neither_votes_nor_is_voted_for(n_queries: int | None) -> None:
    query, key = drawn(8)
    votes = PromptVotes(n_queries).see(query, key, visible_after(PADDING, 8), SCORING)
    for row, width in enumerate(PADDING):
        assert (votes[row, ..., :width] == 0).all()
        alone = PromptVotes(n_queries).see(
            query[row : row + 1, ..., width:, :], key[row : row + 1, :, width:], None, SCORING
        )
        np.testing.assert_allclose(votes[row : row + 1, ..., width:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [4, None])
def test_a_chunk_that_is_all_padding_leaves_no_votes_behind(n_queries: int | None) -> None:
    query, key = drawn(8)
    visible = visible_after(PADDING, 8)
    voting = PromptVotes(n_queries)
    early = voting.see(query[..., :4, :], key[:, :, :4], visible[:, :4], SCORING)
    assert (early[2] == 0).all()
    votes = voting.see(query[..., 4:, :], key, visible, SCORING)
    np.testing.assert_allclose(votes, written_out(query, key, n_queries, PADDING), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [4, None])
def test_a_chunk_that_does_not_follow_begins_a_new_prompt(n_queries: int | None) -> None:
    voting = PromptVotes(n_queries)
    see_in_chunks(voting, *drawn(9, seed=1), [3, 9])
    query, key = drawn(7, seed=2)
    votes = see_in_chunks(voting, query, key, [2, 7])
    np.testing.assert_allclose(votes, written_out(query, key, n_queries), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [4, None])
def test_a_prompt_after_tokens_that_were_decoded_in_between_votes_alone(n_queries: int | None) -> None:
    query, key = drawn(12)
    voting = PromptVotes(n_queries)
    see_in_chunks(voting, query, key, [6])
    # Places 6 and 7 were decode steps, which nobody showed.
    votes = voting.see(query[..., 8:, :], key, None, SCORING)
    np.testing.assert_allclose(votes, written_out(query, key, 4), rtol=0, atol=1e-12)


def test_a_batch_of_another_size_begins_a_new_prompt() -> None:
    query, key = drawn(9)
    voting = PromptVotes(None)
    voting.see(query[..., :4, :], key[:, :, :4], None, SCORING)
    votes = voting.see(query[:1, ..., 4:, :], key[:1], None, SCORING)
    np.testing.assert_allclose(votes, written_out(query[:1], key[:1], 5), rtol=0, atol=1e-12)


def test_a_long_chunk_is_summed_in_pieces_to_the_same_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = drawn(11)
    monkeypatch.setattr(prompt_votes, "_QUERIES_AT_ONCE", 3)
    for n_queries in (5, None):
        votes = PromptVotes(n_queries).see(query, key, visible_after(PADDING, 11), SCORING)
        np.testing.assert_allclose(votes, written_out(query, key, n_queries, PADDING), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_votes_are_summed_in_float32_at_least(dtype: torch.dtype, sums: torch.dtype) -> None:
    query, key = drawn(9)
    votes = PromptVotes(None).see(query.to(dtype), key.to(dtype), None, SCORING)
    assert votes.dtype == sums
    np.testing.assert_allclose(votes, written_out(query, key, None), rtol=0, atol=0.1)


@pytest.mark.parametrize(("n_queries", "kept"), [(1, 1), (9, 9), (40, 30), (None, 0)])
def test_no_more_queries_are_kept_than_vote(n_queries: int | None, kept: int) -> None:
    query, key = drawn(30)
    voting = PromptVotes(n_queries)
    see_in_chunks(voting, query, key, (18, 24, 30))
    assert voting._queries is not None
    numbers = voting._queries.untyped_storage().nbytes() // query.itemsize
    assert numbers == kept * ROWS * KV_HEADS * GROUP * HEAD_DIM
