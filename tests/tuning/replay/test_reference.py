"""Replay of all units at once against one unit at a time in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from policies import (
    FEATURES,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RandomRefresh,
    RefreshKeys,
    SentenceBoundary,
    StepPolicy,
)
from policies.registry import BUILT_IN
from traces import Trace
from tuning import TraceBatch, replay_policy

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)
NAN = float("nan")


def table(low: float, high: float) -> tuple[tuple[float, ...], ...]:
    values = np.random.default_rng(7).uniform(low, high, UNITS)
    return tuple(tuple(row) for row in values.tolist())


COSINE = CosineThreshold(table(-0.9, 0.3))
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.1, -0.3, 0.7, 0.9, 0.4, table(-1, 2), -0.6), table(-3, -1), 0.4)
POLICIES: dict[str, StepPolicy] = {
    "always_full": AlwaysFull(),
    "never_full": NeverFull(),
    "fixed_stride": FixedStride(3),
    "fixed_stride per unit": FixedStride(table(1, 6), table(0, 5)),
    "cosine_threshold": CosineThreshold(-0.2, check_every=3),
    "cosine_threshold per unit": COSINE,
    "sentence_boundary": SentenceBoundary(tuple(range(0, 1000, 5)), max_age=6),
    "sentence_boundary per unit": SentenceBoundary(tuple(range(1, 1000, 8)), max_age=table(2, 9)),
    "random_refresh": RandomRefresh(0.3, 0.618, 0.1),
    "random_refresh per unit": RandomRefresh(table(0, 1), table(0, 0.99), table(0, 0.99)),
    "learned_logistic": LOGISTIC,
    "learned_logistic without features": LearnedLogistic((), (), table(-1, 1)),
    "max_age": MaxAge(NeverFull(), 4),
    "max_age per unit": MaxAge(COSINE, table(1, 9)),
    "refresh_keys": RefreshKeys(COSINE),
    "refresh_keys per unit": RefreshKeys(FixedStride(3), ((1, 0, 0), (0, 1, 1))),
    "budget_constrained": BudgetConstrained(AlwaysFull(), 0.3),
    "budget_constrained per unit": BudgetConstrained(MaxAge(LOGISTIC, 5), table(0, 1), table(0, 2)),
}


def at(parameter: Any, unit: tuple[int, int]) -> float:
    return parameter if isinstance(parameter, (int, float)) else parameter[unit[0]][unit[1]]


def decide(policy: StepPolicy, unit: tuple[int, int], seen: dict[str, float]) -> bool:
    """What the documentation of each kind says, for one unit."""
    match policy:
        case AlwaysFull():
            return True
        case NeverFull():
            return False
        case FixedStride(stride, phase):
            ticks = (seen["step"] + at(phase, unit)) / at(stride, unit)
            after = (seen["step"] + 1 + at(phase, unit)) / at(stride, unit)
            return math.floor(after) > math.floor(ticks)
        case CosineThreshold(threshold, check_every):
            if math.isnan(seen["query_similarity"]):
                return True
            due = (seen["step"] + 1) % at(check_every, unit) == 0
            return due and seen["query_similarity"] < at(threshold, unit)
        case SentenceBoundary(tokens, max_age):
            return seen["token"] in tokens or seen["age"] >= at(max_age, unit)
        case RandomRefresh(share, rate, phase):
            return math.fmod(at(phase, unit) + at(rate, unit) * (seen["step"] + 1) ** 2, 1) < at(share, unit)
        case LearnedLogistic(features, weights, intercept, threshold):
            value = {
                "age": seen["age"],
                "sqrt_age": math.sqrt(seen["age"]),
                "inverse_age": 1 / seen["age"],
                "query_drift": 1 - seen["query_similarity"],
                "step_drift": 1 - seen["step_similarity"],
                "refresh_loss": 1 - seen["refresh_mass"],
                "refresh_churn": 1 - seen["refresh_overlap"],
            }
            total = at(intercept, unit)
            total += sum(at(weight, unit) * value[name] for name, weight in zip(features, weights, strict=True))
            return math.isnan(total) or 1 / (1 + math.exp(-total)) >= threshold
        case RefreshKeys(inner, _):
            return decide(inner, unit, seen)
        case MaxAge(inner, max_age):
            return decide(inner, unit, seen) or seen["age"] >= at(max_age, unit)
        case BudgetConstrained(inner, budget, burst):
            affordable = seen["n_full"] + 1 <= at(budget, unit) * (seen["step"] + 1) + at(burst, unit)
            return decide(inner, unit, seen) and affordable
    raise AssertionError(policy)


def slow_replay(trace: Trace, policy: StepPolicy) -> tuple[np.ndarray, np.ndarray, int]:
    n_steps, max_age = trace.header.n_steps, trace.header.max_age
    full = np.zeros((n_steps, *UNITS), dtype=bool)
    lost = np.zeros((n_steps, *UNITS))
    n_beyond = 0
    for unit in np.ndindex(*UNITS):
        last_full, n_full, churned, mass = -1, 0, NAN, float(trace.fresh_mass[(0, *unit)])
        for step in range(n_steps):
            age = step - last_full
            index = (step, min(age, max_age) - 1, *unit)
            seen = {
                "step": step,
                "age": age,
                "n_full": n_full,
                "query_similarity": float(trace.query_similarity[index]),
                "step_similarity": float(trace.query_similarity[(step, 0, *unit)]),
                "refresh_mass": mass,
                "refresh_overlap": churned,
                "token": int(trace.tokens[trace.header.prompt["n_prompt_tokens"] + step]),
            }
            if decide(policy, unit, seen):
                full[(step, *unit)] = True
                last_full, n_full, churned = step, n_full + 1, float(trace.overlap[index])
                mass = float(trace.fresh_mass[(step + 1, *unit)])
                if isinstance(policy, RefreshKeys) and at(policy.units, unit):
                    lost[(step, *unit)] = 1 - mass
            else:
                lost[(step, *unit)] = 1 - float(trace.recovered_mass[index])
                n_beyond += age > max_age
    return full, lost, n_beyond


def test_every_built_in_kind_has_an_example() -> None:
    replayable = {policy.kind for policy in BUILT_IN} - {"layer_cosine"}
    assert {policy.kind for policy in POLICIES.values()} == replayable
    assert all(name.split()[0] == policy.kind for name, policy in POLICIES.items())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("max_age", [4, 25])
@pytest.mark.parametrize("name", POLICIES)
def test_replay_equals_plain_python(make_trace: MakeTrace, name: str, max_age: int, seed: int) -> None:
    trace = make_trace(n_steps=25, max_age=max_age, units=UNITS, seed=seed)
    replay = replay_policy(trace, POLICIES[name])
    full, lost, n_beyond = slow_replay(trace, POLICIES[name])
    np.testing.assert_array_equal(replay.full[:, 0], full)
    np.testing.assert_allclose(replay.lost_mass[:, 0], lost, atol=1e-6)
    assert replay.beyond_max_age == n_beyond / max((~full).sum(), 1)


@pytest.mark.parametrize("name", POLICIES)
def test_replay_of_several_traces_is_the_replay_of_each(make_trace: MakeTrace, name: str) -> None:
    traces = [make_trace(str(seed), n_steps=15, max_age=9, seed=seed) for seed in range(3)]
    together = replay_policy(TraceBatch(traces), POLICIES[name])
    alone = [replay_policy(trace, POLICIES[name]) for trace in traces]
    for i, replay in enumerate(alone):
        np.testing.assert_array_equal(together.full[:, i], replay.full[:, 0])
        np.testing.assert_array_equal(together.lost_mass[:, i], replay.lost_mass[:, 0])
    assert together.full_share == pytest.approx(np.mean([replay.full_share for replay in alone]))
    assert together.recovered_mass == pytest.approx(np.mean([replay.recovered_mass for replay in alone]))


@pytest.mark.parametrize("name", ["learned_logistic", "cosine_threshold per unit", "max_age per unit"])
def test_the_examples_are_no_trivial_schedules(make_trace: MakeTrace, name: str) -> None:
    replay = replay_policy(make_trace(n_steps=25, max_age=25), POLICIES[name])
    assert 0.1 < replay.full_share < 0.9
    assert len(np.unique(replay.full.reshape(25, -1), axis=1).T) > 3
