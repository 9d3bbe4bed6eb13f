"""Whole numbers in the GPU engine's kernels keep within their type, as far as a small model shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from policies import (
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from policies.stops import FixedDrafts, StopRule
from recycler.decode.recycled import recycled

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not look for overflows"),
    pytest.mark.usefixtures("overflows_are_errors"),
]

LOGISTIC = LearnedLogistic(
    ("sqrt_age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.2, 1.0, 0.1, 1.0, 0.5), -1.8
)


@triton.jit
def _double(numbers):
    value = tl.load(numbers)
    tl.store(numbers, value + value)


def test_an_overflow_is_an_error() -> None:
    small, large = (torch.tensor([n], dtype=torch.int32) for n in (1 << 29, 1 << 30))
    _double[(1,)](small)
    assert small.item() == 1 << 30
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation add"):
        _double[(1,)](large)


@pytest.mark.parametrize(
    ("policy", "selection", "exact"),
    [
        (BudgetConstrained(LOGISTIC, 0.3), Selection(12, sinks=2, window=4, pool_backward=0, pool_forward=0), False),
        (RefreshKeys(FixedStride(2)), Selection(12, sinks=2, window=4), False),
        (CosineThreshold(0.5, 2.5), Selection(12, sinks=2, window=4, ranking="accumulated"), False),
        (FixedStride(2), Selection(12, sinks=2, window=4), FixedDrafts(1)),
    ],
    ids=["learned", "keys only", "accumulated", "exact"],
)
def test_steps_and_rounds_overflow_nowhere(
    runs_on: Callable[..., Any],
    make_tokens: Callable[..., Tensor],
    policy: StepPolicy,
    selection: Selection,
    exact: StopRule | bool,
) -> None:
    # A second round chooses its sets by the votes of the first.
    model = runs_on("cuda").model()
    with recycled(model, policy, selection, exact=exact) as session:
        model.generate(make_tokens(20), max_new_tokens=5, min_new_tokens=5)
    receipt = session.receipt()
    assert receipt.engine == "cuda"
    assert receipt.rounds is None or receipt.rounds.n_rounds >= 2
