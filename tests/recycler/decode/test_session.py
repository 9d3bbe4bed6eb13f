"""`with recycled(...)`: where it must be the stock decoder, where it must be the plain one, and what it refuses."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    FixedStride,
    LearnedLogistic,
    Selection,
    StepPolicy,
    StepSignals,
)
from recycler.decode.recycled import recycled

SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
N_NEW = 16
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


def generate(model: PreTrainedModel, tokens: Tensor, padding: tuple[int, ...] = (), **more: Any) -> Tensor:
    """The new tokens; `padding` masks so many tokens at the left of each row."""
    mask = torch.ones_like(tokens)
    for row, width in enumerate(padding):
        mask[row, :width] = 0
    torch.manual_seed(5)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=N_NEW, **more)[:, tokens.shape[1] :]


def generate_recycled(
    model: PreTrainedModel, policy: StepPolicy, tokens: Tensor, *, selection: Selection = SELECTION, **more: Any
) -> Tensor:
    with recycled(model, policy, selection):
        return generate(model, tokens, **more)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": (0, 7, 19)},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "padding": (0, 7, 19)},
        {"prefill_chunk_size": 9},
        {"prefill_chunk_size": 19, "padding": (0, 7, 18)},
        {"prefill_chunk_size": 19, "cache_implementation": "static"},
        {"do_sample": True, "temperature": 2.0, "padding": (0, 7, 19)},
        {"use_cache": False},
    ],
    ids=str,
)
def test_always_full_is_the_stock_decoder(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    attention: str,
    how: dict[str, Any],
) -> None:
    model, tokens = make_model("llama", torch.float32, attention), make_tokens(20, rows=3)
    stock = generate(model, tokens, **how)
    assert len(stock.unique()) > 5
    # Without a cache there are no steps.
    uncached = how.get("use_cache") is False
    with pytest.warns(UserWarning, match="nothing was recycled") if uncached else nullcontext():
        assert torch.equal(generate_recycled(model, AlwaysFull(), tokens, **how), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_always_full_is_the_stock_decoder_in_half_precision(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], dtype: torch.dtype, fast: bool
) -> None:
    if fast and dtype == torch.bfloat16:
        pytest.skip("the engine rounds less often than the stock decoder: decode/cpu compares their errors")
    model, tokens, padding = make_model("llama", dtype), make_tokens(20, rows=3), (0, 7, 19)
    stock = generate(model, tokens, padding=padding)
    assert torch.equal(generate_recycled(model, AlwaysFull(), tokens, padding=padding), stock)
    assert not torch.equal(generate_recycled(model, LOGISTIC, tokens, padding=padding), stock)


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 19},
        {"prefill_chunk_size": 9},
        {"prefill_chunk_size": 19},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [(), (0, 7, 18)])
def test_neither_cache_nor_chunks_change_a_schedule(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    how: dict[str, Any],
    padding: tuple[int, ...],
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=3)
    expected = generate_recycled(model, LOGISTIC, tokens, padding=padding)
    assert torch.equal(generate_recycled(model, LOGISTIC, tokens, padding=padding, **how), expected)


@pytest.mark.parametrize("padding", [(), (0, 7, 18)])
def test_masks_of_eager_attention_are_understood(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], padding: tuple[int, ...]
) -> None:
    # In float64, transformers' own eager attention to padding is NaN.
    found = [
        generate_recycled(make_model("llama", torch.float32, attention), LOGISTIC, make_tokens(20, 3), padding=padding)
        for attention in ("eager", "sdpa")
    ]
    assert torch.equal(*found)


@dataclass(frozen=True)
class EveryOtherHead(StepPolicy):
    """A policy of another author: heads take turns."""

    kind: ClassVar[str] = "every_other_head"

    def decide(self, signals: StepSignals) -> Any:
        heads = signals.per_unit(((0.0, 1.0), (1.0, 0.0)))
        return (signals.step + heads) % 2 < 1


def test_policy_of_another_author_decides(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    with recycled(make_model(), EveryOtherHead(), SELECTION) as session:
        generate(make_model(), make_tokens(20, rows=2))
    assert session.receipt().full_steps.tolist() == [[16, 14], [14, 16]]


def test_decoding_with_gradients_finds_the_same_logits(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(20)

    def logits() -> Tensor:
        with recycled(model, LOGISTIC, Selection(8, 2, 3, ranking="updated")):
            cache = model(tokens).past_key_values
            return torch.cat([model(tokens[:, step : step + 1], past_key_values=cache).logits for step in range(8)])

    with torch.no_grad():
        expected = logits()
    assert torch.equal(logits(), expected)


@pytest.mark.parametrize("ranking", ["last_full", "updated", "accumulated"])
def test_a_table_of_one_size_is_k(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], ranking: str
) -> None:
    model, tokens, receipts, logits = make_model(), make_tokens(20, rows=3), [], []
    how: dict[str, Any] = {"max_new_tokens": N_NEW, "return_dict_in_generate": True, "output_logits": True}
    for unit_k in (None, ((8, 8), (8, 8))):
        with recycled(model, LOGISTIC, Selection(8, 2, 3, ranking=ranking, unit_k=unit_k)) as session:
            logits.append(torch.stack(model.generate(tokens, **how).logits))
        receipts.append(session.receipt().to_json())
    # Slots may be in another order, and sums with them.
    torch.testing.assert_close(*logits, rtol=0, atol=1e-10)
    assert receipts[0] == receipts[1]


TURN_STEPS = 9


def converse(
    model: PreTrainedModel, cache: DynamicCache, turns: Sequence[Tensor], n_steps: int = TURN_STEPS
) -> list[Tensor]:
    """Feed each turn at once to a growing cache, and decode greedily; logits by turn, `(rows, steps, vocabulary)`."""
    found = []
    with torch.inference_mode():
        for said in turns:
            logits = [model(said, past_key_values=cache, use_cache=True).logits[:, -1]]
            for _ in range(n_steps):
                token = logits[-1].argmax(-1, keepdim=True)
                logits.append(model(token, past_key_values=cache, use_cache=True).logits[:, -1])
            found.append(torch.stack(logits, dim=1))
    return found


def test_every_turn_has_a_receipt_and_together_they_are_the_whole(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model("llama"), make_tokens(40, rows=2)
    cache = DynamicCache(config=model.config)
    with recycled(model, FixedStride(3), SELECTION) as session:
        converse(model, cache, [tokens[:, :20], tokens[:, 20:25]])
        # The third turn is not over yet.
        turns, whole = session.turns(), session.receipt()
        converse(model, cache, [tokens[:, 25:40]])
        assert len(session.turns()) == 3
    assert [turn.n_steps for turn in session.turns()] == [TURN_STEPS] * 3
    assert len(turns) == 2
    assert whole.n_steps == sum(turn.n_steps for turn in turns)
    for name in ("full_steps", "tokens_read", "tokens_dense"):
        assert np.array_equal(getattr(whole, name), sum(getattr(turn, name) for turn in turns))
    # Full attention reads more at each turn.
    assert turns[0].tokens_dense.sum() < turns[1].tokens_dense.sum()


def test_accounts_begin_anew_with_each_turn(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model("llama"), make_tokens(40)
    with recycled(model, BudgetConstrained(AlwaysFull(), 0.2), SELECTION) as session:
        converse(model, DynamicCache(config=model.config), [tokens[:, :20], tokens[:, 20:25], tokens[:, 25:]])
    # 27 steps would pay for 5 full ones; 9 pay for 1.
    assert [turn.full_steps.min() for turn in session.turns()] == [1, 1, 1]
    assert [turn.full_steps.max() for turn in session.turns()] == [1, 1, 1]


@pytest.mark.parametrize("kept", [20, 24, 12], ids=["answer withdrawn", "part of it kept", "question rewritten"])
def test_after_a_crop_it_decodes_as_if_nothing_had_been_there(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor], kept: int
) -> None:
    model, tokens = make_model("llama"), make_tokens(40, rows=2)
    # Several voters are those of the chunk that was read last.
    selection = replace(SELECTION, prompt_queries=1)
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with recycled(model, LOGISTIC, selection):
        converse(model, cache, [tokens[:, :20]])
        cache.crop(kept - cache.get_seq_length())
        (second,) = converse(model, cache, [tokens[:, 30:]])
    with recycled(model, LOGISTIC, selection):
        converse(model, other, [tokens[:, : min(kept, 20)]], n_steps=max(kept - 20, 0))
        (alone,) = converse(model, other, [tokens[:, 30:]])
    assert torch.allclose(second, alone, atol=1e-4)
    assert torch.equal(second.argmax(-1), alone.argmax(-1))
