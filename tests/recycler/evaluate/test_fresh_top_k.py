"""The ceiling: the set of a full step, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import Selection
from recycler.decode.read_prompt import read_prompt
from recycler.evaluate.fresh_top_k import FreshTopK
from recycler.evaluate.selecting_rows import SelectingRows
from recycler.evaluate.token_selector import Chosen, TokenSelector

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 4
SELECTIONS = {
    "window": Selection(7, sinks=1, window=2, pool_backward=1, pool_forward=2),
    "bare": Selection(5, sinks=0, window=0, pool_forward=0, group="mean"),  # type: ignore[arg-type]
    "paper": Selection(7, sinks=0, window=0, pool_backward=3, pool_forward=3),
}


def drawn(n_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(KV_HEADS, GROUP, HEAD_DIM, generator=generator, dtype=torch.float64)
    return query, torch.randn(KV_HEADS, n_tokens, HEAD_DIM, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("n_tokens", [3, 12, 30])
def test_it_is_the_set_that_a_full_step_chooses(
    plain_set: Callable[..., Any], selection: Selection, n_tokens: int
) -> None:
    query, key = drawn(n_tokens)
    chosen = FreshTopK(selection).choose(0, query, key, 0.5)
    weights = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).numpy()
    for head in range(KV_HEADS):
        expected = plain_set(weights[head], selection).places
        for member in range(GROUP):
            assert chosen.allowed[head, member].nonzero()[:, 0].tolist() == expected


def test_what_is_read_is_every_key_and_the_values_of_the_set() -> None:
    query, key = drawn(30)
    assert FreshTopK(SELECTIONS["window"]).choose(0, query, key, 0.5).tokens_read.tolist() == [(30 + 7) / 2] * 2
    query, key = drawn(4)
    assert FreshTopK(SELECTIONS["window"]).choose(0, query, key, 0.5).tokens_read.tolist() == [4, 4]


@pytest.mark.parametrize("layer", [0, 1])
def test_every_unit_s_set_is_of_its_own_size(
    plain_set: Callable[..., Any], selection_of_unit: Callable[..., Selection], layer: int
) -> None:
    selection = Selection(7, sinks=1, window=2, pool_forward=2, unit_k=((4, 9), (10, 3)))
    query, key = drawn(30)
    chosen = FreshTopK(selection).choose(layer, query, key, 0.5)
    weights = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).numpy()
    for head in range(KV_HEADS):
        expected = plain_set(weights[head], selection_of_unit(selection, layer, head)).places
        for member in range(GROUP):
            assert chosen.allowed[head, member].nonzero()[:, 0].tolist() == expected
    assert chosen.tokens_read.tolist() == [(30 + size) / 2 for size in selection.unit_k[layer]]  # type: ignore[index]


class Latest(TokenSelector):
    """Every query head attends to a number of latest tokens of its own."""

    def choose(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> Chosen:
        kv_heads, group, tokens = *query.shape[:2], key.shape[1]
        n_latest = torch.arange(2, 2 + kv_heads * group).reshape(kv_heads, group, 1)
        allowed = torch.arange(tokens) >= tokens - n_latest
        return Chosen(allowed, allowed.any(1).sum(-1).double())


class All(TokenSelector):
    """Full attention."""

    def choose(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> Chosen:
        allowed = torch.ones((*query.shape[:2], key.shape[1]), dtype=torch.bool)
        return Chosen(allowed, allowed[:, 0].sum(-1).double())


@pytest.mark.parametrize("n_prompt", [1, 2, 18])
def test_rows_that_choose_everything_are_the_stock_decoder(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], n_prompt: int
) -> None:
    model, tokens = make_model(), make_tokens(n_prompt + 30)[0]
    rows = SelectingRows(model, read_prompt(model, tokens[:n_prompt], 30), [All()])
    with torch.no_grad():
        stock = model(tokens[None]).logits[0]
    for place in range(n_prompt, n_prompt + 30):
        step = rows.step(tokens[place : place + 1])
        torch.testing.assert_close(step.logits[0], stock[place], rtol=0, atol=1e-10)
        assert step.full.all()
        assert (step.tokens_read == place + 1).all()
        assert step.dense_tokens == place + 1


def test_rows_attend_to_what_their_selector_allows_each_head_and_to_nothing_else(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # One layer: its keys and values do not depend on what was attended to, so one masked forward says it all.
    model, tokens = make_model(layers=1), make_tokens(20)[0]
    rows = SelectingRows(model, read_prompt(model, tokens[:18], 2), [All(), Latest()])
    steps = [rows.step(tokens[place].expand(2)) for place in (18, 19)]
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].repeat(1, 4, 1, 1)
    for place in (18, 19):
        for head in range(4):
            mask[0, head, place, : place + 1 - (2 + head)] = False
    with torch.no_grad():
        expected = model(tokens[None], attention_mask=mask).logits[0]
        stock = model(tokens[None]).logits[0]
    for place, step in zip((18, 19), steps, strict=True):
        torch.testing.assert_close(step.logits[0], stock[place], rtol=0, atol=1e-10)
        torch.testing.assert_close(step.logits[1], expected[place], rtol=0, atol=1e-10)
        assert (step.logits[0] - step.logits[1]).abs().max() > 1e-3
        assert step.full[:, 0].tolist() == [[True, True], [False, False]]
        # Heads of a group have 2 and 3, and 4 and 5 latest tokens.
        np.testing.assert_array_equal(step.tokens_read[:, 0], [[place + 1] * 2, [3, 5]])
