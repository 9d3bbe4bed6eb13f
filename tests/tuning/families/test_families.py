"""What every family promises, whatever parameters the search tries."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FixedTrial

from policies import BudgetConstrained, ModelShape, NeverFull, PolicyFile, Selection
from traces import Trace
from tuning import FAMILIES, TraceBatch, TuningData, families_named, replay_policy
from tuning.divide.allocation import STRIDES

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)
MODEL = ModelShape("tiny", *UNITS, query_heads=6, head_dim=8)
BUDGETS = (0.02, 0.1, 0.5, 1.0)
# Float arithmetic on buckets is allowed a hair, a step is not.
HAIR = 1e-8

every_family = pytest.mark.parametrize("name", FAMILIES)
every_budget = pytest.mark.parametrize("budget", BUDGETS)


def drifting(make_trace: MakeTrace, seed: int, n_steps: int) -> Trace:
    """A trace in which sets go stale and queries turn away with age, each unit at a pace of its own."""
    rng = np.random.default_rng(seed)
    pace = np.geomspace(0.003, 0.3, 6).reshape(UNITS)
    age = np.arange(1, n_steps + 1)[None, :, None, None]
    noise = rng.lognormal(0, 0.3, (n_steps, n_steps, *UNITS))
    stale = 1 - np.exp(-pace * age * noise)
    return make_trace(
        str(seed),
        n_steps=n_steps,
        max_age=n_steps,
        units=UNITS,
        recovered_mass=1 - 0.6 * stale,
        query_similarity=1 - 1.5 * stale * rng.uniform(0.7, 1.3, stale.shape),
        overlap=1 - stale,
        fresh_mass=rng.uniform(0.7, 1, (n_steps + 1, *UNITS)),
        seed=seed,
    )


@pytest.fixture(scope="module")
def data_at(make_trace: MakeTrace) -> Callable[..., TuningData]:
    @lru_cache
    def traces(n_steps: int) -> TraceBatch:
        return TraceBatch([drifting(make_trace, seed, n_steps) for seed in range(2)])

    def data_at(budget: float, n_steps: int = 60) -> TuningData:
        cost = np.random.default_rng(0).lognormal(0, 1, UNITS)
        return TuningData(traces(n_steps), budget, cost / cost.mean())

    return data_at


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def suggested(name: str, data: TuningData, seed: int = 0) -> tuple[dict[str, Any], BudgetConstrained]:
    """Random parameters out of the family's search space, and their policy."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    trial = study.ask()
    policy = FAMILIES[name].suggest(trial, data)
    assert isinstance(policy, BudgetConstrained)
    return dict(trial.params), policy


@every_family
@every_budget
@pytest.mark.parametrize(("n_steps", "seed"), [(60, 0), (12, 1), (12, 2)])
def test_no_policy_exceeds_the_budget(
    data_at: Callable[..., TuningData], name: str, budget: float, n_steps: int, seed: int
) -> None:
    data = data_at(budget, n_steps)
    _, policy = suggested(name, data, seed)
    replay = replay_policy(data.traces, policy)
    full = replay.full
    per_unit = np.broadcast_to(policy.budget, UNITS)
    assert policy.mean_budget <= budget * (1 + HAIR)
    steps = np.arange(1, n_steps + 1)
    assert (full.cumsum(0) <= per_unit * steps[:, None, None, None] + HAIR).all()
    # A refresh by keys alone counts half.
    assert ((full * replay.full_cost).mean((1, 2, 3)).cumsum() <= budget * steps * (1 + HAIR)).all()


@every_family
def test_the_same_parameters_and_data_give_the_same_policy(data_at: Callable[..., TuningData], name: str) -> None:
    data = data_at(0.1)
    parameters, policy = suggested(name, data)
    again = dataclasses.replace(data, unit_cost=data.unit_cost.copy())
    assert FAMILIES[name].suggest(FixedTrial(parameters), again) == policy
    assert json.dumps(parameters)


@every_family
@every_budget
def test_a_policy_survives_its_file_and_decides_the_same(
    data_at: Callable[..., TuningData], name: str, budget: float, tmp_path: Path
) -> None:
    data = data_at(budget)
    _, policy = suggested(name, data)
    PolicyFile(policy, Selection(64), MODEL).write(tmp_path / "policy.json")
    read = PolicyFile.read(tmp_path / "policy.json").policy
    assert read == policy
    ours, theirs = replay_policy(data.traces, policy), replay_policy(data.traces, read)
    np.testing.assert_array_equal(ours.full, theirs.full)
    np.testing.assert_array_equal(ours.lost_mass, theirs.lost_mass)


@every_family
@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_a_policy_uses_most_of_the_budget(data_at: Callable[..., TuningData], name: str, budget: float) -> None:
    data = data_at(budget)
    # Asking for more than there is: the buckets decide.
    parameters, _ = suggested(name, data)
    policy = FAMILIES[name].suggest(FixedTrial(parameters | {"asked": 2.0}), data)
    # A unit's first refresh may come a stride late.
    assert replay_policy(data.traces, policy).full_share > budget - 1.5 / data.traces.n_steps


@every_family
def test_a_budget_of_one_is_used(data_at: Callable[..., TuningData], name: str) -> None:
    data = data_at(1.0)
    parameters, _ = suggested(name, data)
    policy = FAMILIES[name].suggest(FixedTrial(parameters | {"asked": 1.0, "check_every": 1}), data)
    assert replay_policy(data.traces, policy).full_share > 0.95


@pytest.mark.parametrize("name", ["cosine_profile", "logistic_profile"])
def test_a_unit_that_may_always_run_full_needs_no_reason_to(data_at: Callable[..., TuningData], name: str) -> None:
    data = data_at(1.0)
    parameters, _ = suggested(name, data)
    policy = FAMILIES[name].suggest(FixedTrial(parameters | {"asked": 0.5}), data)
    assert replay_policy(data.traces, policy).full_share == 1


@every_family
@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_a_policy_is_better_than_none(data_at: Callable[..., TuningData], name: str, budget: float) -> None:
    data = data_at(budget)
    assert data.loss(suggested(name, data)[1]) < data.loss(NeverFull())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("profile")])
def test_profiles_give_the_units_that_go_stale_fastest_more(data_at: Callable[..., TuningData], name: str) -> None:
    data = dataclasses.replace(data_at(0.1), unit_cost=np.ones(UNITS))
    _, policy = suggested(name, data)
    budgets = np.ravel(policy.budget)
    assert budgets[-1] > 2 * budgets[0]
    assert replay_policy(data.traces, policy).unit_full_share.ravel()[-1] > data.budget


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("profile")])
def test_profiles_follow_unit_costs(data_at: Callable[..., TuningData], name: str) -> None:
    data = data_at(0.1)
    parameters, _ = suggested(name, data)

    def budgets(cost: np.ndarray) -> np.ndarray:
        other = dataclasses.replace(data, unit_cost=cost.reshape(UNITS))
        policy = FAMILIES[name].suggest(FixedTrial(parameters | {"sharpness": 1.0}), other)
        assert isinstance(policy, BudgetConstrained)
        return np.ravel(policy.budget)

    even = budgets(np.ones(6))
    for unit in (0, 3, 4):
        assert budgets(np.where(np.arange(6) == unit, 5.5, 0.1))[unit] > even[unit]


def test_profiles_refuse_a_budget_below_the_longest_stride(data_at: Callable[..., TuningData]) -> None:
    with pytest.raises(ValueError, match="the longest stride"):
        suggested("stride_profile", data_at(0.99 / STRIDES[-1]))


def test_families_are_known_by_their_names() -> None:
    assert list(FAMILIES) == [
        "fixed_stride",
        "cosine_threshold",
        "learned_logistic",
        "stride_profile",
        "cosine_profile",
        "logistic_profile",
    ]
    assert all(family.name == name for name, family in FAMILIES.items())
    with pytest.raises(TypeError):
        FAMILIES["mine"] = FAMILIES["fixed_stride"]  # type: ignore[index]


def test_families_named_keep_their_order_each_once() -> None:
    assert [family.name for family in families_named([])] == list(FAMILIES)
    names = ["cosine_profile", "fixed_stride", "cosine_profile"]
    assert [family.name for family in families_named(names)] == ["cosine_profile", "fixed_stride"]


@pytest.mark.parametrize("names", [["magic"], ["fixed_stride", "magic"]])
def test_an_unknown_family_is_refused_with_the_known_ones(names: list[str]) -> None:
    known = "fixed_stride, cosine_threshold, learned_logistic, stride_profile, cosine_profile, logistic_profile"
    with pytest.raises(ValueError, match=f"unknown family 'magic': known are {known}"):
        families_named(names)
