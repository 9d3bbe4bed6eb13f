"""Generations one after the other: within a `with`, in two of them, in a conversation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import AlwaysFull, FixedStride, LearnedLogistic, NeverFull, Selection
from recycler.decode.recycled import recycled

SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


def generate(model: PreTrainedModel, tokens: Tensor, **more: Any) -> Tensor:
    found: Tensor = model.generate(tokens, max_new_tokens=16, **more)
    return found


def test_generations_in_a_row_do_not_know_of_each_other(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    with recycled(model, LOGISTIC, SELECTION):
        first, _, second = generate(model, tokens), generate(model, tokens[:, 3:]), generate(model, tokens)
    with recycled(model, LOGISTIC, SELECTION):
        third = generate(model, tokens)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, generate(model, tokens))


def test_prompt_of_one_token_starts_anew(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(1)
    selection = Selection(4, 1, 2)
    with recycled(model, FixedStride(3), selection):
        first, second = generate(model, tokens), generate(model, tokens)
        static = generate(model, tokens, cache_implementation="static")
    assert torch.equal(first, second)
    assert torch.equal(first, static)


@pytest.mark.parametrize("n_more", [0, 1, 5])
def test_conversation_goes_on_from_its_cache(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], n_more: int
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)

    def talk() -> Tensor:
        cache = DynamicCache(config=model.config)
        answer = generate(model, tokens, past_key_values=cache)
        return generate(model, torch.cat([answer, tokens[:, :n_more]], dim=1), past_key_values=cache)

    stock = talk()
    with recycled(model, AlwaysFull(), SELECTION):
        assert torch.equal(talk(), stock)
    with recycled(model, NeverFull(), Selection(99)) as session:
        assert torch.equal(talk(), stock)
    assert session.receipt().n_steps == 2 * 15


def test_a_compiled_call_of_the_model_decodes_as_the_model_does(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    # As `generate` calls models on a GPU, if the cache is static.
    model, tokens = make_model(), make_tokens(20)
    found = []
    for call in (model.__call__, torch.compile(model.__call__, backend="eager")):
        with torch.no_grad(), recycled(model, LOGISTIC, SELECTION) as session:
            cache, steps = call(tokens, use_cache=True).past_key_values, []
            for token in (3, 9, 4, 7, 5, 8):
                steps.append(call(torch.tensor([[token]]), past_key_values=cache).logits)
        found.append((torch.cat(steps), session.receipt().full_steps.tolist()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    assert found[0][1] == found[1][1]
