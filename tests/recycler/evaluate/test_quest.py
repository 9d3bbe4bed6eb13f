"""Quest: page bounds are bounds, and what is read is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recycler.evaluate.quest import Quest

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 4


def drawn(n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Query `(kv_heads, group, head_dim)` and key `(kv_heads, tokens, head_dim)`."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(KV_HEADS, GROUP, HEAD_DIM, generator=generator, dtype=torch.float64)
    return query, torch.randn(KV_HEADS, n_tokens, HEAD_DIM, generator=generator, dtype=torch.float64)


def pages_of(quest: Quest, n_tokens: int) -> list[range]:
    size = quest.page_tokens
    return [range(begin, min(begin + size, n_tokens)) for begin in range(0, n_tokens, size)]


@settings(deadline=None)
@given(n_tokens=st.integers(1, 40), page_tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_page_bound_is_above_every_product_in_the_page(n_tokens: int, page_tokens: int, seed: int) -> None:
    query, key = drawn(n_tokens, seed)
    quest = Quest(page_tokens, page_tokens)
    bounds, products = quest.page_bounds(query, key), query @ key.transpose(-1, -2)
    pages = pages_of(quest, n_tokens)
    assert bounds.shape == (KV_HEADS, GROUP, len(pages))
    for index, page in enumerate(pages):
        assert (bounds[..., index] >= products[..., page].amax(-1) - 1e-12).all()


@settings(deadline=None)
@given(n_tokens=st.integers(1, 40), page_tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_page_bound_is_reached_by_the_best_value_of_every_channel(n_tokens: int, page_tokens: int, seed: int) -> None:
    query, key = drawn(n_tokens, seed)
    quest = Quest(page_tokens, page_tokens)
    best = torch.stack(
        [
            (query[:, :, None] * key[:, None, page.start : page.stop]).amax(2).sum(-1)
            for page in pages_of(quest, n_tokens)
        ],
        dim=-1,
    )
    torch.testing.assert_close(quest.page_bounds(query, key), best, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(n_tokens=st.integers(13, 40), seed=st.integers(0, 99))
def test_each_head_attends_to_its_own_best_pages_and_to_whole_ones(n_tokens: int, seed: int) -> None:
    query, key = drawn(n_tokens, seed)
    quest = Quest(12, page_tokens=4)
    allowed = quest.choose(2, query, key, 0.5).allowed
    bounds = quest.page_bounds(query, key)
    pages = pages_of(quest, n_tokens)
    for head in range(KV_HEADS):
        for member in range(GROUP):
            best = bounds[head, member].argsort(descending=True)[:3].tolist()
            expected = sorted(place for page in best for place in pages[page])
            assert allowed[head, member].nonzero()[:, 0].tolist() == expected


def test_the_last_page_may_be_smaller_and_is_taken_as_it_is() -> None:
    # Pages 0 ... 3, 4 ... 7 and the lone token 8.
    key = torch.zeros(1, 9, 2)
    key[0, 8, 0], key[0, 1, 0] = 3.0, 2.0
    chosen = Quest(8, page_tokens=4).choose(5, torch.tensor([[[1.0, 0.0]]]), key, 1.0)
    assert chosen.allowed[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 8]
    # Its missing tokens must not bound it: against this query a key of zeros would.
    bounds = Quest(8, page_tokens=4).page_bounds(torch.tensor([[[-1.0, 0.0]]]), key)
    assert bounds[0, 0].tolist() == [0, 0, -3]


def test_what_is_read_is_two_bounds_of_every_page_and_each_page_that_any_head_of_the_group_wants_once() -> None:
    key = torch.zeros(1, 10, 2)
    key[0, 0, 0], key[0, 3, 1], key[0, 8, 0] = 1.0, 1.0, 0.5
    # Pages of 2 tokens: the first head wants page 0, the second page 1, the third page 0 again.
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    chosen = Quest(2, page_tokens=2).choose(2, query, key, 1.0)
    assert chosen.allowed.sum(-1).tolist() == [[2, 2, 2]]
    # 4 tokens of 2 pages, and 5 pages with a smallest and a largest key: as much as 5 keys and 5 values.
    assert chosen.tokens_read.tolist() == [4 + 5]
    assert chosen.tokens_read.dtype == torch.float64


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_two_layers_attend_to_everything(layer: int) -> None:
    query, key = drawn(40)
    chosen = Quest(16).choose(layer, query, key, 1.0)
    assert chosen.allowed.all()
    assert chosen.tokens_read.tolist() == [40, 40]
    assert not Quest(16).choose(2, query, key, 1.0).allowed.all()


@pytest.mark.parametrize(("n_tokens", "everything"), [(15, True), (16, True), (17, False)])
def test_as_many_tokens_as_fit_are_all_attended_to_without_bounds(n_tokens: int, everything: bool) -> None:
    query, key = drawn(n_tokens)
    chosen = Quest(16).choose(7, query, key, 1.0)
    assert bool(chosen.allowed.all()) == everything
    assert (chosen.tokens_read.tolist() == [n_tokens] * 2) == everything


@pytest.mark.parametrize(("k", "page_tokens"), [(8, 16), (24, 16), (0, 1), (16, 0), (-16, 16)])
def test_half_pages_are_refused(k: int, page_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"k must be a multiple of {page_tokens} tokens, not {k}"):
        Quest(k, page_tokens)
