"""What is the GPU engine's own: room that grows under a graph, shares of work, and policies that it must ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policies import FixedStride, LearnedLogistic, RefreshKeys, Selection, StepPolicy
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled

Make = Callable[..., Any]

N_PROMPT = 14
SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
LOGISTIC = LearnedLogistic(("age", "query_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 1.0, 0.5), -1.8)


@pytest.mark.parametrize(
    "policy",
    [FixedStride(2, ((0, 1), (1, 0))), RefreshKeys(LOGISTIC, ((1, 0), (0, 0)))],
    ids=lambda policy: policy.kind,
)
def test_buffers_grow_and_nothing_is_lost(
    runs_on: Make,
    on_engine: Make,
    reference: Make,
    make_tokens: Make,
    policy: StepPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The cache grows every 3 tokens, and with 5 and 9 more than the kernels have room for.
    monkeypatch.setattr("recycler.decode.cache._LEAST_ROOM_TOKENS", 3)
    runs = runs_on("cuda")
    on_engine(chunk_tokens=4)
    asked = (runs.model(), policy, SELECTION, make_tokens(N_PROMPT + 10), N_PROMPT)
    found, expected = runs.follow(*asked), reference(*asked)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=runs.subject.atol)
    expected.assert_counted_by(found.receipt)


def test_how_the_work_is_shared_changes_nothing_but_rounding(runs_on: Make, on_engine: Make, make_tokens: Make) -> None:
    runs, done = runs_on("cuda"), []
    asked = (runs.model(), LOGISTIC, SELECTION, make_tokens(N_PROMPT + 4, rows=2), N_PROMPT)
    for how in ({"n_programs": 1, "tile_bytes": 4096, "chunk_tokens": 64}, {"n_programs": 9, "chunk_tokens": 8}):
        on_engine(**how)
        done.append(runs.follow(*asked))
    torch.testing.assert_close(done[0].logits, done[1].logits, rtol=0, atol=runs.subject.atol)
    for name in ("full_steps", "tokens_read"):
        np.testing.assert_array_equal(getattr(done[0].receipt, name), getattr(done[1].receipt, name), err_msg=name)


@pytest.mark.parametrize(
    ("reads_query", "when"), [(False, "between steps"), (True, "in the middle of every layer")], ids=str
)
def test_a_policy_that_is_no_program_is_called_on_the_host_and_it_says_so(
    runs_on: Make, make_tokens: Make, asks_for_the_layer: Make, reads_query: bool, when: str
) -> None:
    runs, policy = runs_on("cuda"), asks_for_the_layer(reads_query)
    with pytest.warns(UserWarning, match=f"^the policy asks_for_the_layer is called on the host {when}, and the GPU"):
        runs.follow(runs.model(), policy, SELECTION, make_tokens(N_PROMPT + 1), N_PROMPT)


def test_audits_find_what_those_of_the_plain_path_find(
    make_model: Make, make_tokens: Make, on_engine: Make, device: torch.device
) -> None:
    model, tokens = make_model(head_dim=16, dtype=torch.float32).to(device), make_tokens(N_PROMPT, rows=2).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    on_engine()

    def run(fast: bool) -> tuple[list[list[int]], Receipt]:
        with recycled(model, FixedStride(3), SELECTION, audit=4, fast=fast) as session:
            found = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
        return found.tolist(), session.receipt()

    (found, receipt), (expected, plain) = run(True), run(False)
    model.to("cpu")
    assert (receipt.engine, plain.engine, found) == ("cuda", "plain", expected)
    assert receipt.audited_kl.shape == (2 * 8,)
    assert receipt.audited_kl.max() > 1e-4
    np.testing.assert_allclose(receipt.audited_kl, plain.audited_kl, rtol=1e-2, atol=1e-6)
