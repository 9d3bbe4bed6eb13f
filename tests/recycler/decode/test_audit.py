"""Audits say what a full forward over the same text says, and leave full attention's cache behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from policies import AlwaysFull, BudgetConstrained, FixedStride, NeverFull, Selection
from recycler.decode.cpu.many import attend_many
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.model.divergence import kl_divergence

Make = Callable[..., Any]
SELECTION = Selection(12, sinks=2, window=4, pool_forward=2)
N_NEW = 18


class _Heard(LogitsProcessor):
    """Keeps all logits: what decoding really said."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


@pytest.fixture(params=[True, False], ids=["engine", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test of this file runs on the engine and on the plain path."""
    monkeypatch.setitem(globals(), "recycled", partial(recycled, fast=request.param))
    return bool(request.param)


def generate(
    model: PreTrainedModel, tokens: Tensor, padding: tuple[int, ...] = (), **more: Any
) -> tuple[Tensor, list[Tensor], DynamicCache]:
    """All tokens, the logits of every step, the prompt's last among them, and the cache."""
    mask, heard, cache = torch.ones_like(tokens), _Heard(), DynamicCache(config=model.config)
    for row, width in enumerate(padding):
        mask[row, :width] = 0
    how = {"attention_mask": mask, "max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0} | more
    found = model.generate(tokens, past_key_values=cache, logits_processor=LogitsProcessorList([heard]), **how)
    return found, heard.logits, cache


def full_logits(model: PreTrainedModel, text: Tensor, padding: tuple[int, ...]) -> Tensor:
    mask = torch.ones_like(text)
    for row, width in enumerate(padding):
        mask[row, :width] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: Tensor = model(text, attention_mask=mask, position_ids=places).logits
    return logits


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    # `generate` hands on logits in float32.
    return kl_divergence(exact.log_softmax(-1), other.to(exact.dtype).log_softmax(-1)).clamp(min=0)


@pytest.mark.parametrize("padding", [(), (0, 7, 19)], ids=["rows of one length", "padded"])
@pytest.mark.parametrize("every", [1, 5, 17])
@pytest.mark.parametrize("policy", [FixedStride(4), BudgetConstrained(FixedStride(2), 0.2)], ids=["stride", "budget"])
def test_an_audit_says_what_a_full_forward_over_the_text_says(
    make_model: Make, make_tokens: Make, policy: Any, every: int, padding: tuple[int, ...]
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=3)
    with recycled(model, policy, SELECTION, audit=every) as session:
        text, heard, _ = generate(model, tokens, padding)
    exact = full_logits(model, text, padding)
    n_audited = (N_NEW - 1) // every * every
    # The first logits are the prompt's, which are full attention's in any case.
    expected = [divergence(exact[:, 20 + step], heard[1 + step]) for step in range(n_audited)]
    receipt = session.receipt()
    found = np.concatenate([part.reshape(3, every).T for part in np.split(receipt.audited_kl, n_audited // every)])
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-4, atol=1e-9)
    assert every == 1 or found.max() > 1e-4
    assert receipt.audit is not None
    assert receipt.audit["row_steps"] == 3 * n_audited
    assert receipt.audit["kl_mean"] == pytest.approx(found.mean())


def test_keys_and_values_that_were_audited_are_those_of_full_attention(
    make_model: Make, make_tokens: Make, fast: bool
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    caches = []
    for every in (None, N_NEW - 1):
        with recycled(model, NeverFull(), SELECTION, audit=every):
            text, _, cache = generate(model, tokens)
        with torch.no_grad():
            whole = model(text[:, :-1], use_cache=True).past_key_values
        caches.append(
            max(float((a.keys - b.keys).abs().max()) for a, b in zip(cache.layers, whole.layers, strict=True))
        )
    apart, apart_audited = caches
    assert apart > 1e-4
    assert apart_audited < 1e-12


@pytest.mark.parametrize("every", [1, 4])
def test_always_full_is_nothing_away_from_full_attention(make_model: Make, make_tokens: Make, every: int) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    stock, *_ = generate(model, tokens)
    with recycled(model, AlwaysFull(), SELECTION, audit=every) as session:
        text, *_ = generate(model, tokens)
    assert torch.equal(text, stock)
    assert session.receipt().audited_kl.max() < 1e-12


def test_audits_neither_split_an_output_nor_hide_what_they_read(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)

    def receipt_of(**how: Any) -> Receipt:
        with recycled(model, NeverFull(), SELECTION, **how) as session:
            for _ in range(2):
                generate(model, tokens)
        (one, other), both = session.turns(), session.receipt()
        assert (one.n_steps, other.n_steps, both.n_steps) == (N_NEW - 1, N_NEW - 1, 2 * N_NEW - 2)
        assert (one.longest_steps, both.longest_steps) == (N_NEW - 1, N_NEW - 1)
        np.testing.assert_array_equal(one.audited_kl, other.audited_kl)
        return both

    audited, without = receipt_of(audit=5), receipt_of()
    assert (without.audit, without.audit_tokens_read, without.to_json()["audit"]) == (None, 0, None)
    np.testing.assert_array_equal(audited.tokens_read, without.tokens_read)
    # Each reads the cache once: 20 tokens of prompt, and 5, 10, 15 since.
    assert audited.audit_tokens_read == 2 * 2 * (25 + 30 + 35)
    more = audited.audit_tokens_read * audited.tokens_read.size / audited.tokens_dense.sum()
    assert audited.read_share == pytest.approx(without.read_share + more)


def test_a_policy_that_asks_the_past_begins_anew_after_an_audit(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(20)
    with recycled(model, FixedStride(6), SELECTION, audit=5) as session:
        generate(model, tokens)
    # A sixth step never comes.
    assert session.receipt().full_share == 0


def test_a_sample_is_of_the_last_steps_between_two_audits_over_the_text_as_it_is(
    make_model: Make, make_tokens: Make
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    with recycled(model, NeverFull(), SELECTION, audit=8, audit_tokens=3) as session:
        text, heard, cache = generate(model, tokens)
    # By hand: five steps as recycled attention leaves them, then three with full attention, and again.
    with recycled(model, NeverFull(), SELECTION), torch.no_grad():
        kept = model(text[:, :20], use_cache=True).past_key_values
        expected = []
        for begin in (20, 28):
            for at in range(begin, begin + 5):
                model(text[:, at : at + 1], past_key_values=kept)
            exact = model(text[:, begin + 5 : begin + 8], past_key_values=kept).logits
            expected += [divergence(exact[:, step], heard[begin - 19 + 5 + step]) for step in range(3)]
    receipt = session.receipt()
    found = np.concatenate([part.reshape(2, 3).T for part in np.split(receipt.audited_kl, 2)])
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-4, atol=1e-9)
    for audited, by_hand in zip(cache.layers, kept.layers, strict=True):
        torch.testing.assert_close(audited.keys[:, :, :36], by_hand.keys)
    assert receipt.notes == (
        "audits are of a sample, 3 of every 8 steps: the others' keys and values are as recycled attention left them.",
    )
    assert receipt.audit is not None
    assert receipt.audit["row_steps"] == 2 * 2 * 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"audit": 4, "audit_tokens": 5}, "audit_tokens must be from 1 to audit=4, whose last steps it repeats"),
        ({"audit": 4, "audit_tokens": 0}, "audit_tokens must be from 1 to audit=4, whose last steps it repeats"),
        ({"audit_tokens": 4}, "audit_tokens=4 is how much an audit repeats, and audit is not given"),
    ],
)
def test_a_sample_of_what_is_not_there_is_refused(make_model: Make, how: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message), recycled(make_model(), NeverFull(), SELECTION, **how):
        pass


@pytest.mark.parametrize("every", [0, -3])
def test_an_audit_of_no_steps_is_refused(make_model: Make, every: int) -> None:
    with (
        pytest.raises(ValueError, match=f"^audit must be at least 1 step, or None for no audits, not {every}\\.$"),
        recycled(make_model(), NeverFull(), SELECTION, audit=every),
    ):
        pass


def test_a_cache_from_which_nothing_can_be_taken_back_is_refused_at_the_first_step(
    make_model: Make, make_tokens: Make
) -> None:
    model = make_model()
    with (
        pytest.raises(ValueError, match=r"^an audit takes tokens back from the cache, which a StaticCache"),
        recycled(model, NeverFull(), SELECTION, audit=4),
    ):
        model.generate(make_tokens(20), max_new_tokens=4, do_sample=False, cache_implementation="static")


def test_calls_by_hand_are_audited_too(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(26, rows=2)
    with recycled(model, NeverFull(), SELECTION, audit=3) as session, torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        heard = [model(tokens[:, at : at + 1], past_key_values=cache).logits[:, -1] for at in range(20, 26)]
    exact = full_logits(model, tokens, ())
    expected = torch.stack([divergence(exact[:, 20 + step], logits) for step, logits in enumerate(heard)], 1)
    found = np.concatenate([part.reshape(2, 3) for part in np.split(session.receipt().audited_kl, 2)], 1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-9)
    assert cache.get_seq_length() == 26


def test_a_caller_may_use_one_buffer_for_all_steps_and_change_logits_where_they_are(
    make_model: Make, make_tokens: Make
) -> None:
    model, tokens = make_model(), make_tokens(26)

    def run(in_place: bool) -> np.ndarray:
        buffer, place = torch.empty((1, 1), dtype=torch.int64), torch.tensor([[19]])
        with recycled(model, NeverFull(), SELECTION, audit=3) as session, torch.no_grad():
            cache = model(tokens[:, :20], use_cache=True).past_key_values
            for at in range(20, 26):
                given, where = tokens[:, at : at + 1], torch.tensor([[at]])
                if in_place:
                    given, where = buffer.copy_(given), place.add_(1)
                logits = model(given, position_ids=where, past_key_values=cache).logits
                if in_place:
                    logits.fill_(-torch.inf)
        return session.receipt().audited_kl

    np.testing.assert_array_equal(run(True), run(False))


def test_steps_with_gradients_are_audited_too(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(23)
    with recycled(model, NeverFull(), SELECTION, audit=3) as session:
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        for at in range(20, 23):
            model(tokens[:, at : at + 1], past_key_values=cache)
    assert session.receipt().audited_kl.shape == (3,)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 1, 21)}, "the attention mask is not one number per row and token"),
        ({"output_attentions": True}, "the call passes output_attentions"),
    ],
    ids=["a mask of four dimensions", "another argument"],
)
def test_a_step_that_an_audit_cannot_repeat_is_refused(
    make_model: Make, make_tokens: Make, more: dict[str, Any], reason: str
) -> None:
    model, tokens = make_model(), make_tokens(21)
    with recycled(model, NeverFull(), SELECTION, audit=3), torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"^an audit cannot repeat this step: {reason}\\.$"):
            model(tokens[:, 20:], past_key_values=cache, **more)


def test_a_step_that_the_audit_did_not_see_is_noticed(make_model: Make, make_tokens: Make) -> None:
    model, tokens = make_model(), make_tokens(24)
    with recycled(model, NeverFull(), SELECTION, audit=3), torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        model(tokens[:, 20:21], past_key_values=cache)

        def go_on() -> None:
            model.model(tokens[:, 21:22], past_key_values=cache)
            model(tokens[:, 22:23], past_key_values=cache)

        with pytest.raises(ValueError, match=r"KV cache|did not come through the model's forward"):
            go_on()


def test_a_cache_in_which_an_audit_was_interrupted_is_not_decoded_from(
    make_model: Make, make_tokens: Make, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    model, tokens = make_model(), make_tokens(24)
    # In the middle of its forward: the first layer has its tokens again, the second has not.
    second, stock, n_kernels = model.model.layers[1].self_attn, model.model.layers[1].self_attn.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (args[0] if args else kwargs["hidden_states"]).shape[1] == 3:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    def kernel(*args: Any) -> Any:
        nonlocal n_kernels
        n_kernels += 1
        if n_kernels == 2:
            raise KeyboardInterrupt
        return attend_many(*args)

    with recycled(model, NeverFull(), SELECTION, audit=3), torch.no_grad():
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        for at in (20, 21):
            model(tokens[:, at : at + 1], past_key_values=cache)
        with monkeypatch.context() as patch:
            if fast:
                patch.setattr("recycler.decode.cpu.drafting.attend_many", kernel)
            else:
                patch.setattr(second, "forward", forward)
            with pytest.raises(KeyboardInterrupt):
                model(tokens[:, 22:23], past_key_values=cache)
        with pytest.raises(ValueError, match=r"^an audit was interrupted, and this KV cache holds neither"):
            model(tokens[:, 23:24], past_key_values=cache)
        # Another text is no matter.
        whole = model(tokens[:, :20], use_cache=True).past_key_values
        model(tokens[:, 20:21], past_key_values=whole)


def test_turns_on_one_growing_cache_are_audited_one_by_one(make_model: Make, make_tokens: Make) -> None:
    model, tokens, cache = make_model(), make_tokens(40), DynamicCache(config=make_model().config)
    with recycled(model, NeverFull(), SELECTION, audit=4) as session:
        text = model.generate(tokens[:, :20], past_key_values=cache, max_new_tokens=7, do_sample=False)
        longer = torch.cat([text, tokens[:, 20:30]], 1)
        model.generate(longer, past_key_values=cache, max_new_tokens=11, do_sample=False)
    assert [turn.audited_kl.size for turn in session.turns()] == [4, 8]
    assert [turn.n_steps for turn in session.turns()] == [6, 10]


@pytest.mark.parametrize("every", [70, 129])
def test_many_steps_are_read_again_some_at_a_time(make_model: Make, make_tokens: Make, every: int) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    with recycled(model, NeverFull(), SELECTION, audit=every) as session:
        text, heard, _ = generate(model, tokens, (0, 3), max_new_tokens=every + 5)
    exact = full_logits(model, text, (0, 3))
    expected = [divergence(exact[:, 20 + step], heard[1 + step]) for step in range(every)]
    found = session.receipt().audited_kl.reshape(2, every).T
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("n_voters", [1, 5, 8])
def test_after_an_audit_sets_are_those_of_a_prompt_that_ended_there(
    make_model: Make, make_tokens: Make, n_voters: int
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    selection = Selection(12, sinks=2, window=4, prompt_queries=n_voters)
    with recycled(model, NeverFull(), selection, audit=8):
        text, heard, _ = generate(model, tokens)
    with recycled(model, NeverFull(), selection), torch.no_grad():
        cache = model(text[:, :20], use_cache=True).past_key_values
        model(text[:, 20:28], past_key_values=cache)
        after = [model(text[:, at : at + 1], past_key_values=cache).logits[:, -1] for at in range(28, 32)]
    for step, logits in enumerate(after):
        torch.testing.assert_close(heard[9 + step].double(), logits.double(), rtol=1e-5, atol=1e-6)
