"""What is said before the first token is what the receipt says after the last."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    NeverFull,
    PolicyFile,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler import explain, recycled
from recycler.decode import explain as explaining
from recycler.model.memory import weight_bytes
from recycler.model.shape import model_shape

SELECTION = Selection(12, sinks=2, window=4)
SIZES = Selection(12, sinks=2, window=4, unit_k=((8, 16), (12, 12)))


@pytest.fixture(autouse=True)
def _gb_per_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading memory takes a tenth of a second every time, and is tested elsewhere."""
    monkeypatch.setattr(explaining, "read_gb_per_s", lambda device: 2.0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("selection", [SELECTION, SIZES])
@pytest.mark.parametrize(
    "policy",
    [
        AlwaysFull(),
        NeverFull(),
        FixedStride(4),
        FixedStride([[1, 2], [4, 8]]),
        RefreshKeys(FixedStride(4), [[1, 0], [0, 1]]),
        BudgetConstrained(AlwaysFull(), [[0.5, 0.25], [0.125, 1.0]]),
        BudgetConstrained(RefreshKeys(CosineThreshold(2 / 3)), 0.25),
    ],
    ids=lambda policy: policy.kind,
)
def test_no_more_is_read_than_was_said(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    policy: StepPolicy,
    selection: Selection,
    fast: bool,
) -> None:
    model, tokens = make_model("llama"), make_tokens(100)
    n_steps = 80
    with recycled(model, policy, selection, fast=fast) as session:
        model.generate(tokens, max_new_tokens=n_steps + 1, min_new_tokens=n_steps + 1)
    receipt = session.receipt()
    said = explain(model, policy, selection, context_tokens=100 + n_steps // 2, fast=fast)
    assert (said.engine, said.why_plain) == (receipt.engine, receipt.why_plain)
    assert receipt.full_share <= said.full_share + 1e-9
    # At a context in the middle of the output; sets of few tokens are a larger share of the shorter half.
    assert receipt.read_share <= said.read_share * 1.03
    if not isinstance(policy, BudgetConstrained) or policy.policy == AlwaysFull():
        assert receipt.full_share == pytest.approx(said.full_share, abs=0.01)
        assert receipt.read_share == pytest.approx(said.read_share, rel=0.05)


def test_memory_is_that_of_cache_and_sets(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama", torch.float32)
    said = explain(model, NeverFull(), SIZES, context_tokens=1000, batch_size=3)
    # 2 layers x 2 KV heads x 8 numbers of keys and values.
    assert said.cache_mb == pytest.approx(2 * 2 * 2 * 8 * 4 * 1000 * 3 / 1e6)
    assert said.sets_mb == pytest.approx(48 * 2 * 8 * 4 * 3 / 1e6)
    # Sets hold no more than there is.
    assert explain(model, NeverFull(), SIZES, context_tokens=10).sets_mb < said.sets_mb / 3


def test_reading_weights_and_cache_takes_time(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float32)
    said = explain(model, FixedStride(4), SELECTION, context_tokens=1000, batch_size=3)
    weights = weight_bytes(model)
    assert weights is not None
    assert said.weights_mb == weights / 1e6
    assert said.memory_full_ms == pytest.approx((said.weights_mb + said.cache_mb) / 2)
    assert said.memory_ms == pytest.approx((said.weights_mb + said.read_share * said.cache_mb) / 2)
    out = io.StringIO()
    said.print(Console(file=out, width=400))
    assert f"{3000 / said.memory_ms:,.0f} tokens per second" in out.getvalue()
    monkeypatch.setattr(explaining, "weight_bytes", lambda model: None)
    said, out = explain(model, FixedStride(4), SELECTION, context_tokens=1000), io.StringIO()
    assert (said.weights_mb, said.memory_ms, said.memory_full_ms) == (None, None, None)
    said.print(Console(file=out, width=400))
    assert "tokens per second" not in out.getvalue()


def test_a_policy_that_nothing_limits_may_read_everything(make_model: Callable[..., PreTrainedModel]) -> None:
    said = explain(make_model("llama"), CosineThreshold(0.5), SELECTION, context_tokens=100)
    assert (said.full_share, said.read_share) == (1, 1)
    out = io.StringIO()
    said.print(Console(file=out, width=200))
    assert "at most 100.0% of unit-steps run full, which reads at most 100.0%" in out.getvalue()


def test_it_says_for_how_long_outputs_a_file_was_tuned(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    file = PolicyFile(FixedStride(4), SELECTION, model_shape(model), horizon_steps=512)
    said = explain(model, file, context_tokens=100)
    out = io.StringIO()
    said.print(Console(file=out, width=200))
    assert "outputs of 512 steps, and holds to twice of that" in out.getvalue()
    assert said.to_json()["horizon_steps"] == 512


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"context_tokens": 0}, "context_tokens must be at least 1, not 0"),
        ({"context_tokens": 9, "batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_numbers_below_one_are_refused(
    make_model: Callable[..., PreTrainedModel], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explain(make_model("llama"), NeverFull(), SELECTION, **how)
