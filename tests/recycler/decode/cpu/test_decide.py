"""Who asks a policy at a step: whoever it is, it decides NumPy's decisions, for the same reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import (
    FEATURES,
    MEASURED_SIGNALS,
    QUERY_SIGNALS,
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RandomRefresh,
    Schedule,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    policy_program,
)
from recycler.decode.cpu.decide import Decisions, NumpyDecisions, ProgramDecisions, decisions
from recycler.decode.per_row import PerRow

SHAPE = LAYERS, ROWS, KV_HEADS = 2, 4, 3
TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.0))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
COSINE = CosineThreshold(0.5, check_every=2)
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, SHARES, 0.7, 2, TABLE), intercept=-2.5, threshold=0.3)
POLICIES: list[StepPolicy] = [
    AlwaysFull(),
    NeverFull(),
    FixedStride(2.5, phase=1),
    FixedStride(TABLE, phase=TABLE),
    COSINE,
    CosineThreshold(SHARES, check_every=TABLE),
    LayerCosine(SHARES, check_every=TABLE),
    SentenceBoundary((3, 7, 5), max_age=TABLE),
    MaxAge(RandomRefresh.drawn(0.3, (LAYERS, KV_HEADS), seed=0), 9),
    LOGISTIC,
    LearnedLogistic(("sqrt_age", "query_drift"), (0.3, SHARES), intercept=TABLE),
    LearnedLogistic(("age", "refresh_loss", "refresh_churn"), (0.3, SHARES, 1), intercept=-2),
    MaxAge(COSINE, TABLE),
    BudgetConstrained(MaxAge(FixedStride(9), 3), SHARES, burst=TABLE),
    BudgetConstrained(MaxAge(LOGISTIC, 5), 1 / 3, burst=1.5),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)


@dataclass(frozen=True)
class InLayerOne(StepPolicy):
    """No program: what it does depends on the layer."""

    kind: ClassVar[str] = "in_layer_one"

    def decide(self, signals: StepSignals) -> Any:
        return (signals.age >= 1) & ((signals.step >= 0) if signals.layer == 1 else (signals.step < 0))


def drive(asked: Decisions, policy: StepPolicy, seed: int, n_steps: int = 12) -> list[dict[str, np.ndarray]]:
    """Decisions, reasons and what NumPy says of the same signals, along some steps, as the engine drives them."""
    rng = np.random.default_rng(seed)
    schedule = Schedule(np.zeros((ROWS, LAYERS, KV_HEADS)), rng.random((ROWS, LAYERS, KV_HEADS)))
    steps = []
    for _ in range(n_steps):
        # On a grid, so that thresholds are met; some are missing.
        measured = np.round(rng.uniform(-1, 1, (5, *SHAPE)), 1)
        measured[rng.random(measured.shape) < 0.15] = np.nan
        token = rng.integers(0, 9, (ROWS, 1, 1))
        asked.begin_step(schedule, token)
        for layer in range(LAYERS):
            for which, name in enumerate(QUERY_SIGNALS):
                asked.signals[layer, :, SIGNALS.index(name)] = measured[which, layer]
            asked.decide(layer)
        seen = dict(zip(QUERY_SIGNALS, measured.swapaxes(1, 2), strict=False))
        reasons: dict[str, Any] = {}
        alone = not isinstance(policy, (PerRow, InLayerOne))
        full = policy.decide(schedule.signals(**seen, reasons=reasons, token=token)) if alone else None
        found = {name: noted.swapaxes(0, 1).copy() for name, noted in asked.reasons.items()}
        steps.append({"full": asked.full.swapaxes(0, 1).copy(), **found})
        if full is not None:
            expected = {name: np.broadcast_to(noted, full.shape) for name, noted in reasons.items()}
            np.testing.assert_equal(steps[-1], {"full": full, **expected})
        schedule.advance(steps[-1]["full"], *measured[-2:].swapaxes(1, 2))
    return steps


@every_policy
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_kernel_decides_as_the_policy_on_numpy(policy: StepPolicy, seed: int) -> None:
    drive(ProgramDecisions([policy_program(policy)], SHAPE), policy, seed)


@every_policy
def test_numpy_in_the_middle_of_every_layer_decides_alike(policy: StepPolicy) -> None:
    drive(NumpyDecisions(policy, SHAPE), policy, seed=7)


def test_programs_are_run_by_a_kernel_and_all_else_by_numpy() -> None:
    for policy in (COSINE, LayerCosine(0.5), FixedStride(TABLE), PerRow((COSINE, AlwaysFull(), LOGISTIC, COSINE))):
        assert type(decisions(policy, SHAPE)) is ProgramDecisions
    for policy in (InLayerOne(), PerRow((InLayerOne(), COSINE, COSINE, COSINE))):
        assert type(decisions(policy, SHAPE)) is NumpyDecisions
    for step in drive(decisions(InLayerOne(), SHAPE), InLayerOne(), 0):
        assert step["full"].all((0, 2)).tolist() == step["full"].any((0, 2)).tolist() == [False, True]


def test_rows_with_policies_of_their_own_follow_them() -> None:
    rows = (COSINE, BudgetConstrained(LOGISTIC, SHARES, 1), FixedStride(TABLE), MaxAge(COSINE, 4))
    together = drive(ProgramDecisions([policy_program(policy) for policy in rows], SHAPE), PerRow(rows), seed=3)
    np.testing.assert_equal(together, drive(NumpyDecisions(PerRow(rows), SHAPE), PerRow(rows), seed=3))
    assert any(step["full"][1].any() for step in together)


def test_what_nobody_measures_stays_unknown() -> None:
    asked = decisions(FixedStride(3), SHAPE)
    asked.begin_step(Schedule(np.zeros((ROWS, LAYERS, KV_HEADS))), np.full((ROWS, 1, 1), 5))
    for name in SIGNALS:
        unknown = np.isnan(asked.signals[:, :, SIGNALS.index(name)])
        assert unknown.all() if name in MEASURED_SIGNALS else not unknown.any()
