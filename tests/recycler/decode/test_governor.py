"""A governed budget: what it does with what audits find, and what that does to an output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies import AlwaysFull, BudgetConstrained, CosineThreshold, FixedStride, Selection
from recycler.decode.governor import Governor
from recycler.decode.recycled import recycled

Make = Callable[..., Any]
SELECTION = Selection(12, sinks=2, window=4, pool_forward=2)
POLICY = BudgetConstrained(CosineThreshold(1.0), ((0.1, 0.3), (0.2, 0.2)))


def course(governor: Governor, found: Callable[[float], float], n_windows: int) -> list[tuple[float, float]]:
    """Budgets and divergences where a window's divergence follows from its budget."""
    windows = []
    for _ in range(n_windows):
        policy = governor.policy
        budget = 1.0 if isinstance(policy, AlwaysFull) else policy.mean_budget
        windows.append(governor.learn(np.full((1, 64), found(budget))))
        assert windows[-1].budget == budget
    return [tuple(window) for window in windows]


def test_a_budget_settles_where_the_divergence_is_the_limit() -> None:
    # A budget of 0.3 gives a third of what 0.1 does.
    windows = course(Governor(POLICY, 0.05, most=1.0), lambda budget: 0.015 / budget, 40)
    budget, kl = windows[-1]
    assert budget == pytest.approx(0.3, rel=0.01)
    assert kl == pytest.approx(0.05, rel=0.01)


def test_an_easy_text_costs_less_than_the_policy_asks_for() -> None:
    budgets = [budget for budget, _ in course(Governor(POLICY, 0.05), lambda _: 0.001, 40)]
    assert budgets[0] == pytest.approx(0.2)
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == pytest.approx(0.2 / 16)


@given(
    limit=st.floats(0.01, 0.2),
    most=st.sampled_from([0.2, 0.5, 1.0]),
    kls=st.lists(st.floats(0, 0.5), min_size=1, max_size=60),
)
def test_full_attention_takes_over_after_a_window_above_the_limit_until_the_output_is_within_it_and_only_then(
    limit: float, most: float, kls: list[float]
) -> None:
    governor, total = Governor(POLICY, limit, most), 0.0
    for n, kl in enumerate(kls, 1):
        policy = governor.policy
        helps_out = isinstance(policy, AlwaysFull)
        assert helps_out or policy.mean_budget <= most * (1 + 1e-9)
        found = 0.0 if helps_out else kl
        total += found
        governor.learn(np.full((1, 4), found))
        is_above = total / n > limit
        assert isinstance(governor.policy, AlwaysFull) == (is_above and (helps_out or kl > limit))


def test_full_attention_helps_out_until_the_output_is_within_its_limit_again() -> None:
    windows = course(Governor(POLICY, 0.05), lambda budget: 0.0 if budget == 1 else 0.12, 8)
    assert [budget == 1 for budget, _ in windows] == [False, True, True, False, True, False, True, True]
    assert np.mean([kl for _, kl in windows]) <= 0.05


@pytest.mark.parametrize(
    ("policy", "limit", "most", "sentence"),
    [
        (FixedStride(4), 0.05, None, "govern_kl steers a budget, and the policy 'fixed_stride' has none: put"),
        (POLICY, 0.0, None, "govern_kl must be a number of nats above 0, not 0.0."),
        (POLICY, float("nan"), None, "govern_kl must be a number of nats above 0, not nan."),
        (POLICY, 0.05, 0.1, "most must be a share from the policy's budget, 0.2, to 1, not 0.1."),
        (POLICY, 0.05, 1.5, "most must be a share from the policy's budget, 0.2, to 1, not 1.5."),
    ],
)
def test_what_cannot_be_governed_is_refused(policy: Any, limit: float, most: float | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        Governor(policy, limit, most)


def test_rows_that_are_not_finite_have_no_say() -> None:
    governor, alone = Governor(POLICY, 0.05), Governor(POLICY, 0.05)
    assert np.isnan(governor.learn(np.full((1, 4), np.nan)).kl)
    found = governor.learn(np.array([[0.02] * 4, [np.nan] * 4, [np.inf] * 4]))
    assert found == alone.learn(np.full((1, 4), 0.02))
    assert governor.policy == alone.policy


def test_a_largest_budget_without_a_limit_is_refused(make_model: Make) -> None:
    with (
        pytest.raises(ValueError, match=r"^most=0.5 is the largest budget of govern_kl, which is not given\.$"),
        recycled(make_model(), POLICY, SELECTION, most=0.5),
    ):
        pass


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_receipts_show_the_course_and_every_output_begins_alike(
    make_model: Make, make_tokens: Make, fast: bool
) -> None:
    model, tokens = make_model(), make_tokens(20, rows=2)
    generate = partial(model.generate, tokens, max_new_tokens=25, do_sample=False)

    def run(limit: float) -> Any:
        with recycled(model, POLICY, SELECTION, fast=fast, audit=4, govern_kl=limit) as session:
            first, second = generate(), generate()
        assert torch.equal(first, second)
        one, other = session.turns()
        assert one.governed == other.governed
        assert len(one.governed) == 6
        assert session.receipt().governed == one.governed + other.governed
        assert session.receipt().to_json()["governed"] == [list(window) for window in session.receipt().governed]
        means = [window.kl for window in one.governed]
        assert np.mean(means) == pytest.approx(one.audited_kl.mean(), rel=1e-5)
        return one

    loose, tight = run(1e3), run(1e-9)
    assert [window.budget for window in loose.governed] == sorted((w.budget for w in loose.governed), reverse=True)
    assert any(window.budget == 1 for window in tight.governed)
    assert tight.full_share > loose.full_share
