"""Generations one after the other: within a `with`, in two of them, in a conversation, in another process."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import AlwaysFull, FixedStride, LearnedLogistic, NeverFull, Selection
from recycler.decode.session import recycled

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


def test_fresh_process_finds_the_same_tokens() -> None:
    program = """if True:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from policies import CosineThreshold, Selection
        from recycler.decode.session import recycled
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, pad_token_id=0)
        model = LlamaForCausalLM(config).eval()
        with recycled(model, CosineThreshold(0.5), Selection(8, 2, 3)) as session:
            print(model.generate(torch.arange(1, 25)[None], max_new_tokens=16).tolist(), session.receipt().to_json())
    """
    with redirect_stdout(StringIO()) as here:
        exec(program, {})
    there = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert there.stdout == here.getvalue()
    assert "full_share" in there.stdout


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
