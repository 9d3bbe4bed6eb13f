"""Receipts: what they add up, say and print; that engines count right is their contract."""

import json
import warnings
from collections.abc import Callable
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    FixedStride,
    MaxAge,
    NeverFull,
    RefreshKeys,
    Selection,
    StepPolicy,
    written_by,
)
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled

SELECTION = Selection(8, sinks=2, window=3)


@pytest.fixture
def receipt_of(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> Callable[..., Receipt]:
    """The receipt of greedy decoding; `n_steps` decode steps after a prompt of 20 tokens, padded as told."""

    def receipt_of(policy: StepPolicy, n_steps: int, padding: tuple[int, ...] = (0,)) -> Receipt:
        mask = torch.tensor([[0] * width + [1] * (20 - width) for width in padding])
        with recycled(make_model(), policy, SELECTION, fast=False) as session:
            tokens = make_tokens(20, rows=len(padding))
            make_model().generate(tokens, attention_mask=mask, max_new_tokens=n_steps + 1)
        return session.receipt()

    return receipt_of


def printed(receipt: Receipt) -> str:
    """As a narrow terminal shows it, spaces aside."""
    console = Console(file=StringIO(), width=80)
    receipt.print(console)
    return " ".join(console.file.getvalue().split())


def test_keys_only_refreshes_are_printed_by_themselves(receipt_of: Callable[..., Receipt]) -> None:
    receipt = receipt_of(RefreshKeys(FixedStride(((1, 4), (10, 100)), ((0, 1), (8, 0))), ((0, 1), (1, 1))), 10)
    assert receipt.to_json()["keys_only_share"] == receipt.keys_only_share == pytest.approx(3 / 40)
    line = "7.5% of unit-steps refreshed their sets by keys alone, each counted as half a full one"
    assert line in printed(receipt)


def test_a_run_without_keys_only_refreshes_does_not_speak_of_them(receipt_of: Callable[..., Receipt]) -> None:
    receipt = receipt_of(RefreshKeys(FixedStride(3), 0), 4)
    assert (receipt.full_share, receipt.keys_only_share) == (0.25, 0)
    assert "keys alone" not in printed(receipt)


@pytest.mark.parametrize(("policy", "share"), [(AlwaysFull(), 1), (NeverFull(), 0)])
def test_ends_of_the_scale_are_counted_exactly(
    receipt_of: Callable[..., Receipt], policy: StepPolicy, share: float
) -> None:
    receipt = receipt_of(policy, 5, padding=(0, 3))
    assert (receipt.unit_full_share == share).all()
    assert receipt.full_share == share
    assert (receipt.read_share == 1) == (share == 1)


def test_batches_of_different_size_add_up(
    make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]
) -> None:
    with recycled(make_model(), AlwaysFull(), SELECTION) as session:
        for rows in (3, 1):
            make_model().generate(make_tokens(20, rows=rows), max_new_tokens=6)
            assert session.receipt().full_share == 1
    receipt = session.receipt()
    assert (receipt.n_steps, receipt.n_rows, receipt.row_steps) == (10, 3, 20)
    assert "100.0% of unit-steps full, 100.0% of the dense KV traffic" in printed(receipt)


def test_reasons_tell_who_overruled_the_policy(receipt_of: Callable[..., Receipt]) -> None:
    forced = receipt_of(MaxAge(NeverFull(), ((2, 5), (1, 100))), 10, padding=(0, 3))
    assert {reason: units.tolist() for reason, units in forced.reasons.items()} == {"max_age": [[10, 4], [20, 0]]}
    denied = receipt_of(BudgetConstrained(AlwaysFull(), ((0.5, 0.1), (0, 1))), 10)
    assert {reason: units.tolist() for reason, units in denied.reasons.items()} == {"budget": [[5, 9], [10, 0]]}
    both = receipt_of(MaxAge(BudgetConstrained(AlwaysFull(), 0.1), 4), 10)
    assert both.full_steps[0, 0] == 2
    # Forced at steps 3 and 7; so, when the budget would allow its first step, 9, the bucket is overdrawn.
    assert {reason: units[0, 0] for reason, units in both.reasons.items()} == {"budget": 10, "max_age": 2}
    assert "max_age asked for a full step in 20.0% of unit-steps" in printed(both)
    assert "budget denied a full step in 100.0% of unit-steps" in printed(both)
    # Asked for at steps 1 to 9, and granted at the last only.
    capped = receipt_of(BudgetConstrained(MaxAge(NeverFull(), 2), 0.1), 10)
    assert capped.full_steps[0, 0] == 1
    assert {reason: units[0, 0] for reason, units in capped.reasons.items()} == {"budget": 8, "max_age": 9}


def test_receipt_is_a_copy(make_model: Callable[..., PreTrainedModel], make_tokens: Callable[..., Tensor]) -> None:
    with recycled(make_model(), MaxAge(NeverFull(), 2), SELECTION) as session:
        make_model().generate(make_tokens(20), max_new_tokens=5)
        early = session.receipt()
        before = json.dumps(early.to_json())
        make_model().generate(make_tokens(20), max_new_tokens=5)
    assert json.dumps(early.to_json()) == before
    assert session.receipt().n_steps == 8


def test_shares_are_nan_before_the_first_step(receipt_of: Callable[..., Receipt]) -> None:
    receipt = receipt_of(AlwaysFull(), 0)
    assert receipt.n_steps == receipt.n_rows == receipt.row_steps == 0
    assert np.isnan([receipt.full_share, receipt.keys_only_share, receipt.read_share]).all()
    assert np.isnan(receipt.unit_full_share).all()
    assert printed(receipt).count("-") >= 4


def test_every_unit_of_a_deep_model_fits_into_a_terminal() -> None:
    full_steps = np.arange(90).reshape(30, 3)
    counts = np.full((30, 3), 100)
    text = printed(Receipt("plain", 100, 1, 100, full_steps, 0 * full_steps, counts, counts))
    for layer, shares in enumerate(full_steps):
        assert "│ " + " │ ".join(map(str, (layer, *shares))) + " │" in text


def test_json_has_plain_totals(receipt_of: Callable[..., Receipt]) -> None:
    values = receipt_of(MaxAge(NeverFull(), 2), 10).to_json()
    assert json.loads(json.dumps(values)) == values
    assert (values["engine"], values["why_plain"]) == ("plain", "fast is False")
    assert (values["n_steps"], values["n_rows"], values["full_share"]) == (10, 1, 0.5)
    assert values["reasons"] == {"max_age": 20}
    assert values["written_by"] == written_by()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("n_steps", "horizon_steps", "warns"), [(8, 4, False), (9, 4, True), (9, None, False)])
def test_an_output_of_more_than_twice_the_horizon_warns_once_and_the_receipt_says_so(
    make_model: Callable[..., PreTrainedModel],
    make_tokens: Callable[..., Tensor],
    fast: bool,
    n_steps: int,
    horizon_steps: int | None,
    warns: bool,
) -> None:
    model = make_model()
    said = f"the longest output has 9 decode steps, and the policy was tuned on {horizon_steps}:"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with recycled(model, FixedStride(3), SELECTION, fast=fast, horizon_steps=horizon_steps) as session:
            for _ in range(2):
                model.generate(make_tokens(20), max_new_tokens=n_steps + 1)
    assert [str(one.message).startswith(said) for one in caught] == [True] * warns
    receipt = session.receipt()
    assert (receipt.longest_steps, receipt.n_steps, receipt.horizon_steps) == (n_steps, 2 * n_steps, horizon_steps)
    assert (said in printed(receipt)) == warns
    assert (receipt.to_json()["longest_steps"], receipt.to_json()["horizon_steps"]) == (n_steps, horizon_steps)
