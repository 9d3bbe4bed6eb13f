"""Replay in compiled code decides and loses, to the last bit, what replay a step at a time does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from policies import (
    FEATURES,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    RandomRefresh,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
)
from policies.arrays import Array
from traces import Trace, write_trace
from tuning import TraceBatch, replay_policy
from tuning.replay import _replay_by_steps

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)
RATES = ((0.1, 0.5, 0.9), (0.3, 0.05, 1.0))
POLICIES: dict[str, StepPolicy] = {
    "clock": FixedStride(((1, 2, 3), (4, 5.5, 6)), ((0, 1, 2), (0, 1.5, 2))),
    "cosine": BudgetConstrained(CosineThreshold(((-0.5, 0.1, 0.2), (0.3, 0.0, -0.1)), check_every=2), RATES, 1),
    "logistic": BudgetConstrained(
        MaxAge(LearnedLogistic(tuple(FEATURES), (0.1, -0.3, 0.7, 0.9, 0.4, 1.5, -0.6), -1.1, 0.4), 7), RATES
    ),
    "random": RandomRefresh.drawn(0.3, UNITS, 1),
    "sentences": SentenceBoundary(tuple(range(0, 1000, 5)), 6),
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
        return self.policy.decide(signals)


def batch_of(make_trace: MakeTrace, max_age: int = 9, n_traces: int = 3) -> TraceBatch:
    names = "abcdefgh"[:n_traces]
    return TraceBatch(
        [make_trace(name, seed=seed, n_steps=24, max_age=max_age, units=UNITS) for seed, name in enumerate(names)]
    )


@pytest.mark.parametrize("max_age", [1, 4, 24])
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_code_and_steps_agree_to_the_last_bit(make_trace: MakeTrace, name: str, max_age: int) -> None:
    policy, batch = POLICIES[name], batch_of(make_trace, max_age)
    compiled, by_steps = replay_policy(batch, policy), _replay_by_steps(batch, policy, policy.needs)
    assert compiled.full.any()
    assert not compiled.full.all()
    np.testing.assert_array_equal(compiled.full, by_steps.full)
    np.testing.assert_array_equal(compiled.lost_mass, by_steps.lost_mass)
    assert compiled.lost_mass.dtype == by_steps.lost_mass.dtype == np.float32
    assert compiled.beyond_max_age == by_steps.beyond_max_age


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_is_no_program_is_replayed_all_the_same(make_trace: MakeTrace, name: str) -> None:
    batch = batch_of(make_trace)
    compiled, by_value = replay_policy(batch, POLICIES[name]), replay_policy(batch, ByValue(POLICIES[name]))
    np.testing.assert_array_equal(compiled.full, by_value.full)
    np.testing.assert_array_equal(compiled.lost_mass, by_value.lost_mass)


@pytest.mark.parametrize("name", POLICIES)
def test_traces_on_disk_replay_as_in_memory(make_trace: MakeTrace, name: str, tmp_path: Path) -> None:
    batch = batch_of(make_trace)
    files = TraceBatch([write_trace(trace, tmp_path) for trace in batch.files if isinstance(trace, Trace)])
    np.testing.assert_array_equal(replay_policy(files, POLICIES[name]).full, replay_policy(batch, POLICIES[name]).full)


def test_only_what_the_policy_needs_is_read_and_no_more_than_mapped(make_trace: MakeTrace, tmp_path: Path) -> None:
    files = TraceBatch([write_trace(make_trace("a", units=UNITS), tmp_path)])
    replay_policy(files, FixedStride(3))
    assert set(files._of_trace) == {("recovered_mass", 0)}
    replay_policy(files, CosineThreshold(0.2))
    assert set(files._of_trace) == {("recovered_mass", 0), ("query_similarity", 0)}
    assert not any(array.flags.owndata or array.flags.writeable for array in files._of_trace.values())
    assert "recovered_mass" not in vars(files)


def test_a_trace_that_ends_early_is_refused_when_it_is_mapped(make_trace: MakeTrace, tmp_path: Path) -> None:
    file = write_trace(make_trace("a", units=UNITS), tmp_path)
    whole = file.path.read_bytes()
    batch = TraceBatch([file])
    file.path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"a.safetensors is no whole trace: recovered_mass cannot be read"):
        replay_policy(batch, FixedStride(2))
    with pytest.raises(ValueError, match=r"no whole trace: nothing cannot be read"):
        file.mapped("nothing")
