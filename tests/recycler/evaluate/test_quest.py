"""Quest: page bounds are bounds, and what is read is counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.read_prompt import read_prompt
from recycler.evaluate.chosen import Chosen
from recycler.evaluate.quest import Quest

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 4


def quest_of(k: int, page_tokens: int = 16, dense_layers: int = 2) -> Quest:
    return Quest("quest", "", k, page_tokens, dense_layers)


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
    quest = quest_of(page_tokens, page_tokens)
    bounds, products = quest.page_bounds(query, key), query @ key.transpose(-1, -2)
    pages = pages_of(quest, n_tokens)
    assert bounds.shape == (KV_HEADS, GROUP, len(pages))
    for index, page in enumerate(pages):
        assert (bounds[..., index] >= products[..., page].amax(-1) - 1e-12).all()


@settings(deadline=None)
@given(n_tokens=st.integers(1, 40), page_tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_page_bound_is_reached_by_the_best_value_of_every_channel(n_tokens: int, page_tokens: int, seed: int) -> None:
    query, key = drawn(n_tokens, seed)
    quest = quest_of(page_tokens, page_tokens)
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
    quest = quest_of(12, page_tokens=4)
    allowed = quest.choose(2, query, key).allowed
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
    chosen = quest_of(8, page_tokens=4).choose(5, torch.tensor([[[1.0, 0.0]]]), key)
    assert chosen.allowed[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 8]
    # Its missing tokens must not bound it: against this query a key of zeros would.
    bounds = quest_of(8, page_tokens=4).page_bounds(torch.tensor([[[-1.0, 0.0]]]), key)
    assert bounds[0, 0].tolist() == [0, 0, -3]


def test_what_is_read_is_two_bounds_of_every_page_and_each_page_that_any_head_of_the_group_wants_once() -> None:
    key = torch.zeros(1, 10, 2)
    key[0, 0, 0], key[0, 3, 1], key[0, 8, 0] = 1.0, 1.0, 0.5
    # Pages of 2 tokens: the first head wants page 0, the second page 1, the third page 0 again.
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    chosen = quest_of(2, page_tokens=2).choose(2, query, key)
    assert chosen.allowed.sum(-1).tolist() == [[2, 2, 2]]
    # 4 tokens of 2 pages, and 5 pages with a smallest and a largest key: as much as 5 keys and 5 values.
    assert chosen.tokens_read.tolist() == [4 + 5]
    assert chosen.tokens_read.dtype == torch.float64


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_two_layers_attend_to_everything(layer: int) -> None:
    query, key = drawn(40)
    chosen = quest_of(16).choose(layer, query, key)
    assert chosen.allowed.all()
    assert chosen.tokens_read.tolist() == [40, 40]
    assert not quest_of(16).choose(2, query, key).allowed.all()


@pytest.mark.parametrize(("n_tokens", "everything"), [(15, True), (16, True), (17, False)])
def test_as_many_tokens_as_fit_are_all_attended_to_without_bounds(n_tokens: int, everything: bool) -> None:
    query, key = drawn(n_tokens)
    chosen = quest_of(16).choose(7, query, key)
    assert bool(chosen.allowed.all()) == everything
    assert (chosen.tokens_read.tolist() == [n_tokens] * 2) == everything


@pytest.mark.parametrize(("k", "page_tokens"), [(8, 16), (24, 16), (0, 1), (16, 0), (-16, 16)])
def test_half_pages_are_refused(k: int, page_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"k must be a multiple of {page_tokens} tokens, not {k}"):
        quest_of(k, page_tokens)


@pytest.mark.parametrize("n_prompt", [1, 2, 18])
def test_pages_that_hold_everything_are_the_stock_decoder(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], n_prompt: int
) -> None:
    model, tokens = make_model(), make_tokens(n_prompt + 30)[0]
    rows = quest_of(48).begin(model, read_prompt(model, tokens[:n_prompt], 30))
    with torch.no_grad():
        stock = model(tokens[None]).logits[0]
    for place in range(n_prompt, n_prompt + 30):
        step = rows.step(tokens[place : place + 1])
        torch.testing.assert_close(step.logits[0], stock[place], rtol=0, atol=1e-10)
        assert step.full.all()
        assert (step.tokens_read == place + 1).all()
        assert step.dense_tokens == place + 1
    assert (rows.decoding.totals().full_steps == 30).all()


class Latest(Quest):
    """Every query head attends to a number of latest tokens of its own."""

    def choose(self, layer: int, query: Tensor, key: Tensor) -> Chosen:
        kv_heads, group, tokens = *query.shape[-3:-1], key.shape[-2]
        n_latest = torch.arange(2, 2 + kv_heads * group).reshape(kv_heads, group, 1)
        allowed = (torch.arange(tokens) >= tokens - n_latest).expand(len(query), -1, -1, -1)
        return Chosen(allowed, allowed.any(-2).sum(-1).double())


def test_a_row_attends_to_what_is_chosen_for_each_head_and_to_nothing_else(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One layer: its keys and values do not depend on what was attended to, so one masked forward says it all.
    model, tokens = make_model(layers=1), make_tokens(20)[0]
    rows = Latest("latest", "", 16).begin(model, read_prompt(model, tokens[:18], 2))
    steps = [rows.step(tokens[place : place + 1]) for place in (18, 19)]
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].repeat(1, 4, 1, 1)
    for place in (18, 19):
        for head in range(4):
            mask[0, head, place, : place + 1 - (2 + head)] = False
    with torch.no_grad():
        expected = model(tokens[None], attention_mask=mask).logits[0]
        stock = model(tokens[None]).logits[0]
    for place, step in zip((18, 19), steps, strict=True):
        torch.testing.assert_close(step.logits[0], expected[place], rtol=0, atol=1e-10)
        assert (step.logits[0] - stock[place]).abs().max() > 1e-3
        assert step.full[:, 0].tolist() == [[False, False]]
        # Heads of a group have 2 and 3, and 4 and 5 latest tokens.
        np.testing.assert_array_equal(step.tokens_read[:, 0], [[3, 5]])
