"""Many policies at once do what each does alone in the decoder, fed the same text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RandomRefresh,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.decode.recycled import recycled
from recycler.measure.closed_loop import ClosedLoop, run_closed_loop, run_closed_loops

N_PROMPT, N_STEPS = 18, 16


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    for function in (recycled, run_closed_loop, run_closed_loops):
        monkeypatch.setitem(globals(), function.__name__, partial(function, fast=request.param))
    return bool(request.param)


POLICIES = (
    AlwaysFull(),
    NeverFull(),
    FixedStride(((2, 3), (5, 1)), ((0, 1), (2, 0))),
    MaxAge(CosineThreshold(0.6, check_every=2), 5),
    BudgetConstrained(CosineThreshold(0.9), ((0.1, 0.5), (0.3, 0.0)), 1),
    LearnedLogistic(("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.2, 1, 1, 1, 1), -2.5),
    LayerCosine(0.8, check_every=3),
    SentenceBoundary(tuple(range(0, 61, 7)), max_age=6),
    RandomRefresh.drawn(0.3, (2, 2), seed=0),
    RefreshKeys(FixedStride(2)),
    RefreshKeys(CosineThreshold(0.9), ((1, 0), (0, 1))),
)
SELECTION = Selection(7, sinks=1, window=2, pool_backward=1, pool_forward=2)


def decode_plainly(
    model: PreTrainedModel, tokens: Tensor, n_prompt: int, policy: StepPolicy, selection: Selection
) -> Tensor:
    """Log-probabilities `(steps, vocabulary)` of the decoder, fed the text token by token."""
    with torch.no_grad(), recycled(model, policy, selection):
        cache = model(tokens[:, :n_prompt]).past_key_values
        logits = [
            model(tokens[:, place : place + 1], past_key_values=cache).logits[0, -1]
            for place in range(n_prompt, tokens.shape[1])
        ]
    return torch.stack(logits).log_softmax(-1)


def run(model: PreTrainedModel, tokens: Tensor, policies: Sequence[StepPolicy], **more: Any) -> ClosedLoop:
    how = {"selection": SELECTION, "n_prompt_tokens": N_PROMPT} | more
    return run_closed_loop(model, tokens[0].numpy(), policies=policies, **how)


@pytest.mark.parametrize("model", [{}, {"family": "qwen2", "attention": "eager"}], ids=str)
def test_every_policy_does_what_the_decoder_does(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    spy: Callable[..., Any],
    model: dict[str, Any],
) -> None:
    tiny, tokens = make_model(**model), make_tokens(N_PROMPT + N_STEPS)
    found = run(tiny, tokens, POLICIES)
    reference = decode_plainly(tiny, tokens, N_PROMPT, AlwaysFull(), SELECTION)
    # transformers' own eager attention takes its softmax in float32.
    tolerance = 1e-5 if model.get("attention") == "eager" else 1e-12
    for row, policy in enumerate(POLICIES):
        spying = spy(policy)
        log_p = decode_plainly(tiny, tokens, N_PROMPT, spying, SELECTION)
        kl = (reference.exp() * (reference - log_p)).sum(-1)
        np.testing.assert_allclose(found.kl[row], kl.clamp(min=0), rtol=0, atol=tolerance)
        assert found.agreement[row].tolist() == (log_p.argmax(-1) == reference.argmax(-1)).tolist()
        right = [*(log_p[:-1].argmax(-1) == tokens[0, N_PROMPT + 1 :]).tolist(), False]
        assert found.accuracy[row].tolist() == right
        for layer, steps in spying.seen.items():
            cost = np.broadcast_to(np.asarray(policy.full_cost), found.full.shape[2:])[layer]
            assert found.full[row, :, layer].tolist() == [(step["full"][0] * cost).tolist() for step in steps]


def test_policies_differ_and_their_errors_show(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    found = run(make_model(), make_tokens(N_PROMPT + N_STEPS), POLICIES)
    assert len(set(found.full_share)) == len(POLICIES)
    assert (found.kl[1:].mean(1) > 0.01).all()
    assert not found.agreement[1:].all()
    assert found.kl.min() >= 0


def test_a_keys_only_refresh_counts_half_in_the_full_share(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    policies = [FixedStride(4), RefreshKeys(FixedStride(4)), RefreshKeys(FixedStride(4), ((1, 0), (0, 0)))]
    found = run(make_model(), make_tokens(N_PROMPT + N_STEPS), policies)
    assert found.full_share.tolist() == [1 / 4, 1 / 8, (1 / 2 + 3) / 4 / 4]
    assert [set(row.ravel()) for row in found.full] == [{0, 1}, {0, 0.5}, {0, 0.5, 1}]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_always_full_diverges_by_rounding_only(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    rows: int,
    dtype: torch.dtype,
    rounding: float,
) -> None:
    # A matrix product may round its last rows otherwise than the others.
    policies = [NeverFull() if row % 3 == 1 else AlwaysFull() for row in range(rows)]
    found = run(make_model("llama", dtype), make_tokens(N_PROMPT + N_STEPS), policies)
    for row, policy in enumerate(policies):
        assert (found.kl[row].max() <= rounding) == isinstance(policy, AlwaysFull)
    assert found.agreement[0].all()
    assert found.full_share[0] == 1


def test_rows_alone_are_rows_together(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)
    together = run(model, tokens, POLICIES)
    for row, policy in enumerate(POLICIES):
        alone = run(model, tokens, [policy])
        np.testing.assert_allclose(alone.kl[0], together.kl[row], rtol=0, atol=1e-12)
        assert (alone.full[0] == together.full[row]).all()
        assert (alone.agreement[0] == together.agreement[row]).all()
    backwards = run(model, tokens, POLICIES[::-1])
    np.testing.assert_allclose(backwards.kl[::-1], together.kl, rtol=0, atol=1e-12)
    assert (backwards.full[::-1] == together.full).all()


@pytest.mark.parametrize(
    ("n_prompt", "n_steps", "more"),
    [(1, 12, {}), (2, 12, {}), (18, 1, {}), (18, 6, {"chunk_tokens": 1}), (18, 6, {"chunk_tokens": 7})],
)
def test_prompts_of_any_length_and_chunks_of_any_size(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    n_prompt: int,
    n_steps: int,
    more: dict[str, Any],
) -> None:
    model, tokens = make_model(), make_tokens(n_prompt + n_steps)
    found = run(model, tokens, [FixedStride(3)], n_prompt_tokens=n_prompt, **more)
    log_p, reference = (
        decode_plainly(model, tokens, n_prompt, policy, SELECTION) for policy in (FixedStride(3), AlwaysFull())
    )
    kl = (reference.exp() * (reference - log_p)).sum(-1).clamp(min=0)
    np.testing.assert_allclose(found.kl[0], kl, rtol=0, atol=1e-12)


def test_model_is_stock_again_afterwards(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = make_model(), make_tokens(N_PROMPT + N_STEPS)
    with torch.no_grad():
        expected = model(tokens).logits
        run(model, tokens, POLICIES)
        assert torch.equal(model(tokens).logits, expected)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("model", "n_tokens", "policy", "message"),
    [
        (
            {},
            257,
            NeverFull(),
            "prompt has 18 tokens and 239 more .* but the model has only 256 positions",
        ),
        ({}, 30, FixedStride(((2, 3),)), "the policy is for 1 layers x 2 KV heads, but .* has 2 layers x 2 KV heads"),
        ({"family": "mistral", "sliding_window": 16}, 20, NeverFull(), "sliding window of 16 tokens"),
        ({"family": "mistral", "sliding_window": 24}, 24, NeverFull(), "sliding window of 24 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    model: dict[str, Any],
    n_tokens: int,
    policy: StepPolicy,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_model(**model), make_tokens(n_tokens), [policy])


def test_several_texts_at_once_are_each_alone(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., torch.Tensor]
) -> None:
    model, texts = make_model(), [make_tokens(30, seed=seed)[0].numpy() for seed in range(3)]
    policies, selection = [FixedStride(3), NeverFull()], Selection(9, 1, 3, ranking="decayed")  # type: ignore[arg-type]
    together = run_closed_loops(model, texts, 20, policies, selection)
    for text, found in zip(texts, together, strict=True):
        alone = run_closed_loop(model, text, 20, policies, selection)
        np.testing.assert_array_equal(found.full, alone.full)
        np.testing.assert_array_equal(found.read_share, alone.read_share)
        np.testing.assert_array_equal(found.accuracy, alone.accuracy)
        np.testing.assert_allclose(found.kl, alone.kl, rtol=0, atol=1e-10)
