"""What reading a prompt leaves behind, against the model's own attention, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import Selection
from recycler.decode.read_prompt import read_prompt
from recycler.model.attention_hook import attention_replaced

N_PROMPT = 20
SELECTIONS = {
    "window": Selection(7, sinks=1, window=2, pool_backward=1, pool_forward=2),
    "mean": Selection(5, sinks=0, window=0, pool_forward=0, group="mean"),  # type: ignore[arg-type]
}


def attention_of(model: PreTrainedModel, tokens: Tensor) -> list[np.ndarray]:
    """Causal attention `(kv_heads, group, queries, tokens)` of every layer, noted in one forward of the whole text."""
    layers: list[np.ndarray] = []

    def noting(stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            grouped = query[0].unflatten(0, (key.shape[1], -1))
            logits = grouped @ key[0, :, None].transpose(-1, -2) * kwargs["scaling"]
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            layers.append(logits.masked_fill(future, float("-inf")).softmax(-1).numpy())
            return stock(module, query, key, *args, **kwargs)

        return attend

    with torch.no_grad(), attention_replaced(model, noting):
        model(tokens[None])
    return layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("chunk_tokens", [4096, 7, 1])
def test_votes_are_the_summed_attention_of_the_last_queries(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    family: str,
    chunk_tokens: int,
) -> None:
    model, tokens = make_model(family), make_tokens(N_PROMPT)[0]
    prompt = read_prompt(model, tokens, 4, prompt_queries=(1, 3, 8, None), chunk_tokens=chunk_tokens)
    for layer, attention in zip(prompt.layers, attention_of(model, tokens), strict=True):
        np.testing.assert_allclose(layer.probabilities[0], attention[:, :, -1], rtol=0, atol=1e-10)
        assert set(layer.votes) == {3, 8, None}
        for n_queries in (3, 8):
            expected = attention[:, :, -n_queries:].sum(2)
            np.testing.assert_allclose(layer.votes[n_queries][0], expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(layer.votes[None][0], attention.sum(2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("prompt_queries", [1, 3, None])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_the_first_set_is_what_the_voting_queries_choose(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    plain_set: Callable[..., Any],
    selection: Selection,
    prompt_queries: int | None,
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT)[0]
    selection = replace(selection, prompt_queries=prompt_queries)
    prompt = read_prompt(model, tokens, 4, prompt_queries=[prompt_queries])
    first = prompt.first_sets(selection, 2)
    for layer, attention in enumerate(attention_of(model, tokens)):
        votes = attention[:, :, 0 if prompt_queries is None else -prompt_queries :].sum(2)
        for row in (0, 1):
            for head in (0, 1):
                expected = plain_set(votes[head], selection).places
                assert sorted(first.positions[layer, row, head].tolist()) == expected
                # What is recovered is still that of the last query.
                mass = attention[head, :, -1].mean(0)[expected].sum()
                np.testing.assert_allclose(first.mass[layer, row, head], mass, rtol=0, atol=1e-10)


def test_queries_that_choose_together_choose_otherwise_than_the_last(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    prompt = read_prompt(make_model(), make_tokens(N_PROMPT)[0], 4, prompt_queries=(1, 3, None))
    sets = set()
    for prompt_queries in (1, 3, None):
        selection = replace(SELECTIONS["window"], prompt_queries=prompt_queries)
        sets.add(str(prompt.first_sets(selection, 1).positions.sort(-1).values.tolist()))
    assert len(sets) == 3


@pytest.mark.parametrize("prompt_queries", [(1,), (3, None)])
@pytest.mark.parametrize("n_prompt", [1, 2, N_PROMPT])
def test_cache_and_logits_are_those_of_the_stock_model(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    n_prompt: int,
    prompt_queries: tuple[int | None, ...],
) -> None:
    model, tokens = make_model(), make_tokens(n_prompt)[0]
    prompt = read_prompt(model, tokens, 4, prompt_queries=prompt_queries, chunk_tokens=6)
    with torch.no_grad():
        stock = model(tokens[None], use_cache=True)
    assert prompt.n_tokens == n_prompt
    torch.testing.assert_close(prompt.logits, stock.logits[:, -1], rtol=0, atol=1e-10)
    for mine, theirs in zip(prompt.layers, stock.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.key, theirs.keys, rtol=0, atol=1e-10)
        torch.testing.assert_close(mine.value, theirs.values, rtol=0, atol=1e-10)
    assert model.config._attn_implementation == "sdpa"


def test_a_selection_that_the_prompt_was_not_read_for_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    prompt = read_prompt(make_model(), make_tokens(N_PROMPT)[0], 4, prompt_queries=(3,))
    for prompt_queries in (2, None):
        with pytest.raises(ValueError, match=f"the prompt was not read for prompt_queries={prompt_queries}"):
            prompt.first_sets(Selection(7, 1, 2, prompt_queries=prompt_queries), 1)
    assert prompt.first_sets(Selection(7, 1, 2), 1).end == N_PROMPT


@pytest.mark.parametrize(("n_prompt", "n_steps"), [(256, 1), (200, 57), (1, 256)])
def test_more_tokens_than_the_model_has_positions_are_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], n_prompt: int, n_steps: int
) -> None:
    message = f"prompt has {n_prompt} tokens and {n_steps} more .* but the model has only 256 positions"
    with pytest.raises(ValueError, match=message):
        read_prompt(make_model(), make_tokens(n_prompt)[0], n_steps)
    assert read_prompt(make_model(), make_tokens(n_prompt)[0], n_steps - 1).n_tokens == n_prompt


def test_a_sliding_window_that_the_steps_would_reach_is_refused(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model("mistral", sliding_window=24), make_tokens(N_PROMPT)[0]
    with pytest.raises(ValueError, match="sliding window of 24 tokens"):
        read_prompt(model, tokens, 4)
    assert read_prompt(model, tokens, 3).n_tokens == N_PROMPT
