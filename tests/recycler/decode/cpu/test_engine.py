"""The engine on tiny models: the plain path's decoding, in other kernels; and what it leaves to the plain path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numba
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
    LearnedLogistic,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler.decode.receipt import Receipt
from recycler.decode.session import Session, recycled

Make = Callable[..., Any]

SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
UPDATED = Selection(9, sinks=1, window=3, group="mean", ranking="updated")
SIZED = Selection(12, 2, 4, 1, 2, unit_k=((6, 18), (14, 10)))
SIZED_UPDATED = Selection(9, 1, 3, group="mean", ranking="updated", unit_k=((4, 14), (11, 7)))
SIZED_ACCUMULATED = Selection(9, 1, 3, ranking="accumulated", unit_k=((4, 14), (11, 7)))
BUDGET = BudgetConstrained(CosineThreshold(0.9), 0.3, 1)
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)
KEYS_ONLY = RefreshKeys(LOGISTIC)
# Prefill of the first row sees all; of the others, so many tokens less.
PADDING = (0, 5, 11)
# Norms of transformers round to float32 in every model.
ATOL = 1e-5


@dataclass
class Run:
    """What came out of some decode steps: logits `(steps, rows, vocabulary)`, and what was done."""

    tokens: list[list[int]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    receipt: Receipt = None  # type: ignore[assignment]

    @property
    def logits(self) -> Tensor:
        return torch.stack(self.steps)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def decode(
    model: PreTrainedModel,
    tokens: Tensor,
    policy: StepPolicy,
    n_steps: int = 12,
    *,
    selection: Selection = SELECTION,
    fast: bool = True,
    after_step: Callable[[Session, int], None] = lambda session, step: None,
    forced: Tensor | None = None,
) -> Run:
    """Decode greedily, or along `forced`; the model is called directly, as far past its positions as one likes."""
    rows, n_prompt = tokens.shape
    mask = (torch.arange(n_prompt + n_steps) >= torch.tensor(PADDING[:rows])[:, None]).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    run, cache, given = Run(), None, tokens
    with torch.no_grad(), recycled(model, policy, selection, fast=fast) as session:
        for step in range(n_steps):
            end = n_prompt + step
            how = {"attention_mask": mask[:, :end], "position_ids": places[:, end - given.shape[1] : end]}
            output = model(given, past_key_values=cache, use_cache=True, **how)
            cache, logits = output.past_key_values, output.logits[:, -1]
            if step > 0:
                after_step(session, step)
            run.steps.append(logits)
            given = logits.argmax(-1, keepdim=True) if forced is None else forced[:, step : step + 1]
            run.tokens.append(given[:, 0].tolist())
        run.receipt = session.receipt()
    return run


def assert_same_run(engine: Run, plain: Run) -> None:
    assert (engine.receipt.engine, plain.receipt.engine) == ("cpu", "plain")
    assert engine.tokens == plain.tokens
    assert_same_receipt(engine.receipt, plain.receipt)
    torch.testing.assert_close(engine.logits, plain.logits, rtol=0, atol=ATOL)


def assert_same_receipt(one: Receipt, other: Receipt) -> None:
    counted = ("full_steps", "keys_only_steps", "tokens_read", "tokens_dense", "reasons")
    for name in ("n_steps", "n_rows", "row_steps", *counted):
        np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("selection", [SELECTION, UPDATED], ids=["last_full", "updated"])
@pytest.mark.parametrize("policy", [FixedStride(3), BUDGET, LOGISTIC, KEYS_ONLY], ids=lambda policy: policy.kind)
@pytest.mark.parametrize(
    "how",
    [
        {"family": "qwen3", "head_dim": 16},
        {"family": "qwen2", "kv_heads": 1},
        {"family": "llama", "kv_heads": 1},
        {"family": "llama", "kv_heads": 4},
        {"family": "llama", "attention_bias": True, "mlp_bias": True},
        {"family": "mistral", "sliding_window": None},
    ],
    ids=str,
)
def test_the_engine_decodes_as_the_plain_path_does(
    make_model: Make, make_tokens: Make, how: dict[str, Any], policy: StepPolicy, selection: Selection
) -> None:
    model, tokens = make_model(**how), make_tokens(20, rows=3)
    plain = decode(model, tokens, policy, 24, selection=selection, fast=False)
    assert 0 < plain.receipt.full_share < 1
    assert_same_run(decode(model, tokens, policy, 24, selection=selection), plain)


@pytest.mark.parametrize("selection", [SIZED, SIZED_UPDATED, SIZED_ACCUMULATED], ids=lambda one: one.ranking)
@pytest.mark.parametrize("policy", [FixedStride(3), BUDGET, LOGISTIC], ids=lambda policy: policy.kind)
def test_units_with_sizes_of_their_own_decode_as_on_the_plain_path(
    make_model: Make, make_tokens: Make, policy: StepPolicy, selection: Selection
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=3)
    plain = decode(model, tokens, policy, 24, selection=selection, fast=False)
    assert 0 < plain.receipt.full_share < 1
    assert_same_run(decode(model, tokens, policy, 24, selection=selection), plain)


def test_a_set_that_was_put_off_is_of_its_own_size(make_model: Make, make_tokens: Make) -> None:
    # Every unit runs full several times in a row before it next runs recycled, each at another step.
    policy = FixedStride(((1.2, 1.5), (1.4, 1.1)))
    model, tokens = make_model(), make_tokens(14, rows=2)
    plain = decode(model, tokens, policy, 60, selection=SIZED, fast=False)
    assert 0.5 < plain.receipt.full_share < 1
    assert_same_run(decode(model, tokens, policy, 60, selection=SIZED), plain)


@pytest.mark.parametrize(
    "policy", [FixedStride(2, ((0, 1), (1, 0))), BUDGET, LOGISTIC, KEYS_ONLY], ids=lambda policy: policy.kind
)
def test_buffers_grow_and_nothing_is_lost(make_model: Make, make_tokens: Make, policy: StepPolicy) -> None:
    # Room is for 256 tokens at first; at the step before growth, some unit runs full and has its choice put off.
    model, tokens = make_model(), make_tokens(14, rows=2)
    plain = decode(model, tokens, policy, 300, fast=False)
    assert_same_run(decode(model, tokens, policy, 300), plain)


def test_receipts_of_engine_and_plain_path_are_equal(make_model: Make, make_tokens: Make) -> None:
    receipts = []
    for fast in (True, False):
        with recycled(make_model(), BUDGET, SELECTION, fast=fast) as session:
            make_model().generate(make_tokens(20, rows=2), max_new_tokens=24)
        receipts.append(session.receipt())
    assert receipts[0].reasons["budget"].sum() > 0
    assert receipts[0].full_steps.sum() > 0
    assert_same_receipt(*receipts)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
@pytest.mark.parametrize("policy", [LOGISTIC, KEYS_ONLY], ids=lambda policy: policy.kind)
@pytest.mark.parametrize("selection", [SELECTION, UPDATED], ids=["last_full", "updated"])
def test_threads_change_nothing_but_rounding(
    make_model: Make, make_tokens: Make, selection: Selection, policy: StepPolicy
) -> None:
    model, tokens = make_model(kv_heads=1), make_tokens(45, rows=3)
    alone = decode(model, tokens, policy, 24, selection=selection)
    with threads(2):
        together = decode(model, tokens, policy, 24, selection=selection)
        assert numba.get_num_threads() == 2
    assert together.tokens == alone.tokens
    assert_same_receipt(together.receipt, alone.receipt)
    torch.testing.assert_close(together.logits, alone.logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "selection",
    [SELECTION, UPDATED, Selection(40), SIZED, SIZED_UPDATED, Selection(40, unit_k=((36, 44), (40, 39)))],
    ids=["last_full", "updated", "large", "sizes", "updated sizes", "large sizes"],
)
@pytest.mark.parametrize("policy", [FixedStride(3), BUDGET, LOGISTIC, KEYS_ONLY], ids=lambda policy: policy.kind)
def test_sets_hold_what_they_must_and_copies_are_of_their_tokens(
    make_model: Make, make_tokens: Make, policy: StepPolicy, selection: Selection
) -> None:
    n_prompt, checked = 20, []

    def check(session: Session, step: int) -> None:
        decoding, end = session._run.decoding, n_prompt + step  # type: ignore[union-attr]
        for layer, units in enumerate(decoding._units):  # type: ignore[attr-defined]
            keys = decoding._layers[layer].keys.numpy()  # type: ignore[attr-defined]
            for row, head in np.ndindex(units.filled.shape):
                start, n = PADDING[row], units.filled[row, head]
                places = set(units.positions[row, head, :n].tolist())
                size = selection.k if selection.unit_k is None else selection.unit_k[layer][head]
                assert len(places) == n <= size
                assert min(places) >= start
                assert max(places) < end
                if decoding.full[row, layer, head] and not decoding.keys_only[row, layer, head]:
                    continue
                # Of a unit that ran a full step the set is chosen later; the others have used their own.
                assert n == min(size, end - start)
                assert places >= set(range(start, start + selection.sinks)) | {end - 1}
                assert places >= set(range(max(start, end - selection.window), end))
                copied = keys[row, head, units.positions[row, head, :n]]
                np.testing.assert_array_equal(units.set_key[row, head, :n], copied)
                read = (end - start + n) / 2 if decoding.keys_only[row, layer, head] else n
                assert decoding.tokens_read[row, layer, head] == read
                checked.append(n)

    decode(make_model(), make_tokens(n_prompt, rows=3), policy, 40, selection=selection, after_step=check)
    assert len(checked) > 100


def test_in_bfloat16_the_engine_is_as_close_to_exact_as_the_stock_decoder(make_model: Make, make_tokens: Make) -> None:
    model, tokens, forced = make_model("llama", torch.bfloat16), make_tokens(20, rows=3), make_tokens(24, 3, seed=1)
    exact = decode(copy.deepcopy(model).double(), tokens, AlwaysFull(), 24, fast=False, forced=forced).logits
    # Always full, the plain path is the stock decoder.
    stock = decode(model, tokens, AlwaysFull(), 24, fast=False, forced=forced)
    engine = decode(model, tokens, AlwaysFull(), 24, forced=forced)
    assert (engine.receipt.engine, engine.logits.dtype) == ("cpu", torch.bfloat16)
    error, stock_error = ((run.logits.double() - exact)[1:].abs().mean() for run in (engine, stock))
    assert 0 < error <= 1.2 * stock_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_sizes_of_units_the_engine_is_as_close_to_exact_as_the_plain_path(
    make_model: Make, make_tokens: Make, dtype: torch.dtype
) -> None:
    model, tokens, forced = make_model("llama", dtype), make_tokens(20, rows=3), make_tokens(24, 3, seed=1)
    how: dict[str, Any] = {"selection": SIZED, "forced": forced}
    exact = decode(copy.deepcopy(model).double(), tokens, FixedStride(3), 24, fast=False, **how).logits
    plain = decode(model, tokens, FixedStride(3), 24, fast=False, **how)
    engine = decode(model, tokens, FixedStride(3), 24, **how)
    assert engine.receipt.engine == "cpu"
    np.testing.assert_array_equal(engine.receipt.tokens_read, plain.receipt.tokens_read)
    error, plain_error = ((run.logits.double() - exact)[1:].abs().mean() for run in (engine, plain))
    assert 0 < error <= 1.2 * plain_error
