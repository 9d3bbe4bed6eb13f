"""Scores of given continuations: identities with the stock forward, with closed loop, and with generation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import AlwaysFull, BudgetConstrained, FixedStride, NeverFull, RefreshKeys, Selection, StepPolicy
from recycler import Scored, recycled, score, score_each
from recycler.decode.read_prompt import read_prompt
from recycler.decode.rows import decode_rows
from recycler.measure.closed_loop import follow, run_closed_loop

N_CONTEXT, N = 40, 16
SELECTION = Selection(8, sinks=2, window=3)
POLICIES = (
    NeverFull(),
    FixedStride(((1, 4), (10, 100)), ((0, 1), (8, 0))),
    RefreshKeys(FixedStride(5)),
    BudgetConstrained(AlwaysFull(), 0.2),
)
ENGINES = pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])


@pytest.fixture
def text(make_tokens: Callable[..., Tensor]) -> Tensor:
    return make_tokens(N_CONTEXT + N, seed=3)[0]


def stock_log_p(model: PreTrainedModel, text: Tensor) -> Tensor:
    """What one stock forward predicts of the continuation, `(N, vocabulary)`."""
    with torch.inference_mode():
        predicted: Tensor = model(text[None]).logits[0, N_CONTEXT - 1 : -1].log_softmax(-1)
    return predicted


def assert_stock(scored: Scored, model: PreTrainedModel, text: Tensor) -> None:
    predicted = stock_log_p(model, text)
    of_tokens = predicted.gather(-1, text[N_CONTEXT:, None])[:, 0]
    np.testing.assert_allclose(scored.log_probabilities, of_tokens.numpy(), atol=1e-5)
    np.testing.assert_array_equal(scored.is_greedy, (predicted.argmax(-1) == text[N_CONTEXT:]).numpy())


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_always_full_scores_as_the_stock_forward_does(
    make_model: Callable[..., PreTrainedModel], text: Tensor, dtype: torch.dtype, fast: bool
) -> None:
    model = make_model(dtype=dtype)
    scored = score(model, AlwaysFull(), text[:N_CONTEXT], text[N_CONTEXT:], SELECTION, fast=fast)
    assert_stock(scored, model, text)
    assert scored.receipt.full_share == 1
    assert scored.receipt.n_steps == N - 1
    assert scored.receipt.engine == ("cpu" if fast else "plain")


@ENGINES
def test_a_set_as_large_as_the_text_scores_as_full_attention(
    make_model: Callable[..., PreTrainedModel], text: Tensor, fast: bool
) -> None:
    all_of_it = Selection(N_CONTEXT + N, sinks=2, window=3)
    scored = score(make_model(), NeverFull(), text[:N_CONTEXT], text[N_CONTEXT:], all_of_it, fast=fast)
    assert_stock(scored, make_model(), text)
    assert scored.receipt.full_share == 0


@ENGINES
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("prompt_queries", [1, None])
def test_a_policy_scores_what_closed_loop_follows(
    make_model: Callable[..., PreTrainedModel],
    text: Tensor,
    policy: StepPolicy,
    prompt_queries: int | None,
    fast: bool,
) -> None:
    model, selection = make_model(), dataclasses.replace(SELECTION, prompt_queries=prompt_queries)
    scored = score(model, policy, text[:N_CONTEXT].tolist(), text[N_CONTEXT:].numpy(), selection, fast=fast)
    prompt = read_prompt(model, text[:N_CONTEXT], N, prompt_queries=[prompt_queries])
    rows = decode_rows(model, prompt, [AlwaysFull(), policy], selection, fast=fast)
    followed = follow(rows, text[N_CONTEXT:], lambda step, log_p: log_p[0])
    of_full = stock_log_p(model, text).gather(-1, text[N_CONTEXT:, None])[:, 0].numpy()
    np.testing.assert_allclose(of_full[1:] - scored.log_probabilities[1:], followed.nll_change[1, :-1], atol=1e-9)
    assert abs(followed.nll_change[1, :-1]).max() > 1e-3
    np.testing.assert_array_equal(scored.is_greedy[1:], followed.accuracy[1, :-1])
    loop = run_closed_loop(model, text[:-1].numpy(), N_CONTEXT, [policy], selection, fast=fast)
    assert scored.receipt.full_share == pytest.approx(loop.full_share[0], rel=1e-12)
    dense = np.arange(N_CONTEXT + 1, N_CONTEXT + N)
    assert scored.receipt.read_share == pytest.approx((loop.read_share[0] * dense).sum() / dense.sum(), rel=1e-12)


@ENGINES
def test_what_a_session_writes_greedily_is_greedy_throughout(
    make_model: Callable[..., PreTrainedModel], text: Tensor, fast: bool
) -> None:
    model = make_model()
    with recycled(model, FixedStride(4), SELECTION, fast=fast) as session:
        written = model.generate(text[None, :N_CONTEXT], max_new_tokens=N, do_sample=False)[0, N_CONTEXT:]
    scored = score(model, FixedStride(4), text[:N_CONTEXT], written, SELECTION, fast=fast)
    assert scored.is_greedy.all()
    assert scored.receipt.to_json() == session.receipt().to_json()
    np.testing.assert_array_equal(scored.receipt.tokens_read, session.receipt().tokens_read)


@ENGINES
def test_continuations_of_one_context_score_as_if_each_were_alone(
    make_model: Callable[..., PreTrainedModel], text: Tensor, fast: bool
) -> None:
    model, policy = make_model(), FixedStride(3)
    texts = [text[N_CONTEXT:], text[N_CONTEXT + 4 : N_CONTEXT + 5], text[N_CONTEXT + 3 :]]
    for scored, continuation in zip(
        score_each(model, policy, text[:N_CONTEXT], texts, SELECTION, fast=fast), texts, strict=True
    ):
        alone = score(model, policy, text[:N_CONTEXT], continuation, SELECTION, fast=fast)
        np.testing.assert_array_equal(scored.log_probabilities, alone.log_probabilities)
        np.testing.assert_array_equal(scored.is_greedy, alone.is_greedy)
        assert scored.receipt.to_json() == alone.receipt.to_json()
    assert score_each(model, policy, text[:N_CONTEXT], [], SELECTION) == []


def test_one_token_is_scored_by_the_context_alone(make_model: Callable[..., PreTrainedModel], text: Tensor) -> None:
    scored = score(make_model(), NeverFull(), text[:N_CONTEXT], text[N_CONTEXT : N_CONTEXT + 1], SELECTION)
    assert scored.log_probabilities[0] == pytest.approx(
        float(stock_log_p(make_model(), text)[0, text[N_CONTEXT]]), abs=1e-9
    )
    assert scored.receipt.n_steps == 0
    assert scored.receipt.engine == "none"


def test_a_context_may_be_one_token(make_model: Callable[..., PreTrainedModel], text: Tensor) -> None:
    scored = score(make_model(), AlwaysFull(), text[:1], text[1:], SELECTION)
    with torch.inference_mode():
        predicted = make_model()(text[None]).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(scored.log_probabilities, predicted.gather(-1, text[1:, None])[:, 0].numpy(), atol=1e-9)


def test_text_up_to_the_last_position_is_scored_and_no_more(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    text = make_tokens(258)[0]
    # 256 positions, and the last token is fed to none.
    assert len(score(make_model(), NeverFull(), text[:250], text[250:257], SELECTION).is_greedy) == 7
    with pytest.raises(ValueError, match="has only 256 positions"):
        score(make_model(), NeverFull(), text[:250], text[250:], SELECTION)


@pytest.mark.parametrize(
    ("context", "continuation", "sentence"),
    [
        ([], [1], "the context must be one row of at least one token, not of shape (0,)."),
        ([1], [], "the continuation must be one row of at least one token, not of shape (0,)."),
        ([[1, 2]], [1], "the context must be one row of at least one token, not of shape (1, 2)."),
        ([1], [61], "the token id 61 is outside of the model's vocabulary, 0 to 60."),
        ([-1], [1], "the token id -1 is outside of the model's vocabulary, 0 to 60."),
        ([0.5], [1], "the context must be token ids, which are whole numbers, not torch.float32."),
    ],
)
def test_what_is_no_text_of_the_model_is_refused(
    make_model: Callable[..., PreTrainedModel], context: Any, continuation: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        score(make_model(), AlwaysFull(), context, continuation, SELECTION)


def test_a_model_that_is_recycled_here_already_is_refused(
    make_model: Callable[..., PreTrainedModel], text: Tensor
) -> None:
    again = pytest.raises(ValueError, match="recycled already in this thread")
    with again, recycled(make_model(), AlwaysFull(), SELECTION):
        score(make_model(), AlwaysFull(), text[:N_CONTEXT], text[N_CONTEXT:], SELECTION)


def test_a_continuation_far_beyond_what_was_tuned_on_warns(
    make_model: Callable[..., PreTrainedModel], text: Tensor
) -> None:
    with pytest.warns(UserWarning, match="the longest output has 15 decode steps, and the policy was tuned on 7"):
        score(make_model(), NeverFull(), text[:N_CONTEXT], text[N_CONTEXT:], SELECTION, horizon_steps=7)


def test_scores_of_different_lengths_are_refused(make_model: Callable[..., PreTrainedModel], text: Tensor) -> None:
    scored = score(make_model(), NeverFull(), text[:3], text[3:5], SELECTION)
    with pytest.raises(ValueError, match=re.escape("not (2,) and (1,)")):
        dataclasses.replace(scored, is_greedy=scored.is_greedy[:1])
