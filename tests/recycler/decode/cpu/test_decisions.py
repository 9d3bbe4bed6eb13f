"""Who asks a policy at a step: whoever it is, it decides the same, for the same reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from policies import (
    FEATURES,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    RandomRefresh,
    Schedule,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    policy_program,
)
from recycler.decode.cpu.arrays import Signals
from recycler.decode.cpu.decide import (
    QUERY_SIGNALS,
    Decisions,
    DecisionsAhead,
    DecisionsByLayer,
    DecisionsByProgram,
    decisions,
)
from recycler.decode.per_row import PerRow

SHAPE = LAYERS, ROWS, KV_HEADS = 2, 4, 3
TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.0))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
COSINE = CosineThreshold(0.5, check_every=2)
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, SHARES, 0.7, 2, TABLE), intercept=-2.5, threshold=0.3)
POLICIES: list[StepPolicy] = [
    AlwaysFull(),
    FixedStride(TABLE, phase=TABLE),
    CosineThreshold(SHARES, check_every=TABLE),
    LearnedLogistic(("age", "refresh_loss", "refresh_churn"), (0.3, SHARES, 1), intercept=-2),
    LayerCosine(SHARES, check_every=2),
    SentenceBoundary((3, 7), max_age=TABLE),
    RandomRefresh.drawn(0.3, (LAYERS, KV_HEADS), seed=0),
    MaxAge(COSINE, TABLE),
    BudgetConstrained(MaxAge(FixedStride(9), 3), SHARES, burst=TABLE),
    BudgetConstrained(MaxAge(LOGISTIC, 5), 1 / 3, burst=1.5),
]


@dataclass(frozen=True)
class InLayerOne(StepPolicy):
    """No program: what it does depends on the layer."""

    kind: ClassVar[str] = "in_layer_one"

    def decide(self, signals: StepSignals) -> Any:
        return (signals.age >= 1) & ((signals.step >= 0) if signals.layer == 1 else (signals.step < 0))


def ask(asked: Decisions, policy: StepPolicy, seed: int) -> list[dict[str, np.ndarray]]:
    """Decisions and reasons of some steps, as the engine drives them."""
    rng = np.random.default_rng(seed)
    schedule = Schedule(np.zeros((ROWS, LAYERS, KV_HEADS)), rng.random((ROWS, LAYERS, KV_HEADS)))
    steps = []
    for _ in range(12):
        measured = np.round(rng.uniform(-1, 1, (5, *SHAPE)), 1)
        measured[rng.random(measured.shape) < 0.1] = np.nan
        asked.begin_step(schedule, rng.integers(0, 9, (ROWS, 1, 1)))
        for layer in range(LAYERS):
            asked.decide(layer, Signals(*measured[:, layer]))
        steps.append({"full": asked.full.copy()} | {name: noted.copy() for name, noted in asked.reasons.items()})
        schedule.advance(np.moveaxis(asked.full, 0, 1).copy(), *np.moveaxis(measured[-2:], 1, 2))
    return steps


def test_what_needs_no_query_is_asked_ahead_and_the_rest_by_its_program() -> None:
    assert type(decisions(FixedStride(TABLE), SHAPE)) is DecisionsAhead
    assert type(decisions(BudgetConstrained(FixedStride(3), 0.1), SHAPE)) is DecisionsAhead
    assert type(decisions(SentenceBoundary((3,)), SHAPE)) is DecisionsAhead
    assert type(decisions(COSINE, SHAPE)) is DecisionsByProgram
    assert type(decisions(LayerCosine(0.5), SHAPE)) is DecisionsByProgram
    assert type(decisions(PerRow((COSINE, AlwaysFull(), LOGISTIC, COSINE)), SHAPE)) is DecisionsByProgram


def test_what_asks_for_its_layer_is_asked_layer_by_layer() -> None:
    assert type(decisions(InLayerOne(), SHAPE)) is DecisionsByLayer
    assert type(decisions(PerRow((InLayerOne(), COSINE, COSINE, COSINE)), SHAPE)) is DecisionsByLayer
    for step in ask(decisions(InLayerOne(), SHAPE), InLayerOne(), 0):
        assert step["full"].all((1, 2)).tolist() == step["full"].any((1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("n_policies", [1, 3, 5])
def test_a_policy_per_row_wants_as_many_rows(n_policies: int) -> None:
    with pytest.raises(ValueError, match=f"{n_policies} policies cannot decide for a batch of 4 rows"):
        decisions(PerRow((COSINE,) * n_policies), SHAPE)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_all_ways_to_ask_give_the_same_decisions_and_reasons(policy: StepPolicy) -> None:
    ways: list[Decisions] = [
        DecisionsByProgram([policy_program(policy)], SHAPE),
        DecisionsByLayer(policy, SHAPE),
    ]
    if policy.needs.isdisjoint(QUERY_SIGNALS):
        ways.append(DecisionsAhead(policy, SHAPE))
    first, *others = (ask(way, policy, seed=7) for way in ways)
    for other in others:
        np.testing.assert_equal(other, first)


def test_rows_with_policies_of_their_own_follow_them() -> None:
    rows = (COSINE, BudgetConstrained(LOGISTIC, SHARES, 1), FixedStride(TABLE), MaxAge(COSINE, 4))
    programs = [policy_program(policy) for policy in rows]
    together = ask(DecisionsByProgram(programs, SHAPE), PerRow(rows), seed=3)
    np.testing.assert_equal(together, ask(DecisionsByLayer(PerRow(rows), SHAPE), PerRow(rows), seed=3))
    assert any(step["full"][:, 1].any() for step in together)
