"""Replay in compiled code decides and loses, to the last bit, what replay a step at a time does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numba
import numpy as np
import pytest

import tuning.replay.run
from policies import (
    FEATURES,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    NotAProgram,
    PerUnit,
    RandomRefresh,
    RefreshKeys,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    policy_program,
)
from policies.arrays import Array
from policies.registry import BUILT_IN
from traces import Trace, write_trace
from tuning import Replay, TraceBatch, replay_full_share, replay_policy
from tuning.replay.kernel import replay_trace

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)
RATES = ((0.1, 0.5, 0.9), (0.3, 0.05, 1.0))
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.1, -0.3, 0.7, 0.9, 0.4, 1.5, -0.6), -1.1, 0.4)
POLICIES: dict[str, StepPolicy] = {
    "always_full": AlwaysFull(),
    "never_full": NeverFull(),
    "fixed_stride": FixedStride(3.5, 1),
    "fixed_stride per unit": FixedStride(((1, 2, 3), (4, 5.5, 6)), ((0, 1, 2), (0, 1.5, 2))),
    "cosine_threshold": CosineThreshold(0.1),
    "cosine_threshold per unit": CosineThreshold(((-0.5, 0.1, 0.2), (0.3, 0.0, -0.1)), check_every=2),
    "learned_logistic": LOGISTIC,
    "learned_logistic per unit": LearnedLogistic(("query_drift",), (RATES,), ((-1, -0.5, 0), (-2, -0.7, -0.2))),
    "max_age": MaxAge(CosineThreshold(-0.5), 3),
    "max_age per unit": MaxAge(NeverFull(), ((1, 2, 3), (4, 5, 30))),
    "random_refresh": RandomRefresh.drawn(0.3, UNITS, 1),
    "refresh_keys": RefreshKeys(CosineThreshold(0.2)),
    "refresh_keys per unit": RefreshKeys(CosineThreshold(0.2), ((0, 1, 0), (1, 0, 1))),
    "sentence_boundary": SentenceBoundary(tuple(range(0, 1000, 5)), 6),
    "budget_constrained": BudgetConstrained(MaxAge(LOGISTIC, 7), 0.3),
    "budget_constrained per unit": BudgetConstrained(CosineThreshold(0.2), RATES, 1),
}


@dataclass(frozen=True)
class ByValue(StepPolicy):
    """Looks at values, so that it is no program."""

    policy: StepPolicy
    kind: ClassVar[str] = "by_value"

    @property
    def needs(self) -> frozenset[str]:
        return self.policy.needs

    def decide(self, signals: StepSignals) -> Array:
        assert float(np.max(signals.age)) >= 1
        return self.policy.decide(signals) | (signals.age < 0)

    @property
    def keys_only(self) -> PerUnit:
        return self.policy.keys_only


def batch_of(
    make_trace: MakeTrace, max_age: int = 9, n_traces: int = 3, ages: Sequence[int] | None = None
) -> TraceBatch:
    how: dict[str, Any] = {"n_steps": 24, "max_age": max_age, "ages": ages, "units": UNITS}
    return TraceBatch([make_trace(name, seed=seed, **how) for seed, name in enumerate("abcdefgh"[:n_traces])])


def assert_same(one: Replay, other: Replay) -> None:
    np.testing.assert_array_equal(one.full, other.full)
    np.testing.assert_array_equal(one.lost_mass, other.lost_mass)
    assert one.lost_mass.dtype == other.lost_mass.dtype == np.float32
    assert one.beyond_max_age == other.beyond_max_age
    np.testing.assert_array_equal(one.unit_full_share, other.unit_full_share)


def test_every_kind_that_traces_suffice_for_has_an_example() -> None:
    assert {policy.kind for policy in POLICIES.values()} == {policy.kind for policy in BUILT_IN} - {"layer_cosine"}
    assert all(name.split()[0] == policy.kind for name, policy in POLICIES.items())


@pytest.mark.parametrize("ages", [[1], [1, 2, 3, 4], range(1, 25), [1, 2, 5, 9, 17]], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_code_and_steps_agree_to_the_last_bit(make_trace: MakeTrace, name: str, ages: Sequence[int]) -> None:
    policy, batch = POLICIES[name], batch_of(make_trace, ages=ages)
    policy_program(policy)
    with pytest.raises(NotAProgram):
        policy_program(ByValue(policy))
    compiled, by_steps = replay_policy(batch, policy), replay_policy(batch, ByValue(policy))
    assert (compiled.full_share in (0, 1)) == isinstance(policy, (AlwaysFull, NeverFull))
    assert_same(compiled, by_steps)


@pytest.mark.parametrize("wrap", [lambda policy: policy, ByValue], ids=["compiled", "by steps"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_full_share_alone_is_that_of_the_replay(
    make_trace: MakeTrace, name: str, wrap: Callable[[StepPolicy], StepPolicy]
) -> None:
    policy, batch = wrap(POLICIES[name]), batch_of(make_trace)
    share = replay_full_share(batch, policy)
    assert share.shape == UNITS
    np.testing.assert_array_equal(share, replay_policy(batch, policy).unit_full_share)


@pytest.mark.parametrize("name", POLICIES)
def test_traces_on_disk_replay_as_in_memory(make_trace: MakeTrace, name: str, tmp_path: Path) -> None:
    batch = batch_of(make_trace)
    files = TraceBatch([write_trace(trace, tmp_path) for trace in batch.traces])
    for policy in (POLICIES[name], ByValue(POLICIES[name])):
        assert_same(replay_policy(files, policy), replay_policy(batch, policy))


@pytest.mark.parametrize("name", ["fixed_stride per unit", "learned_logistic"])
def test_traces_replay_on_many_threads_as_on_one(
    make_trace: MakeTrace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(make_trace, n_traces=8)
    alone = replay_policy(batch, POLICIES[name])
    monkeypatch.setattr(tuning.replay.run, "_UNIT_STEPS_PER_THREAD", 1)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 3)
    assert_same(replay_policy(batch, POLICIES[name]), alone)


def test_the_kernel_is_compiled_once_for_all_policies_and_traces(make_trace: MakeTrace, tmp_path: Path) -> None:
    batch = batch_of(make_trace)
    replay_policy(batch, FixedStride(3))
    n_compiled = len(replay_trace.signatures)
    files = TraceBatch([write_trace(trace, tmp_path) for trace in batch.traces])
    turned = make_trace(units=UNITS[::-1])
    views = Trace(turned.header, **{name: array.copy("F") for name, array in turned.arrays().items()})
    for policy in POLICIES.values():
        for traces in (batch, files):
            replay_policy(traces, policy)
            replay_full_share(traces, policy)
    replay_policy(views, FixedStride(3))
    assert len(replay_trace.signatures) == n_compiled
