from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import optuna
import pytest

from policies import BudgetConstrained, FixedStride
from traces import Trace
from tuning import FAMILIES, TraceBatch, TuningData
from tuning.certify.ladder import ladder_budgets
from tuning.families.other_budgets import at_budget, budget_label, references, stride_label

MakeTrace = Callable[..., Trace]

UNITS = (2, 3)


@pytest.fixture(scope="module")
def data(make_trace: MakeTrace) -> TuningData:
    traces = TraceBatch([make_trace(name, n_steps=12, max_age=12, units=UNITS, seed=n) for n, name in enumerate("ab")])
    cost = np.random.default_rng(0).lognormal(0, 1, UNITS)
    return TuningData(traces, 0.1, cost / cost.mean())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_every_family_can_be_had_at_every_budget_of_the_ladder(data: TuningData, name: str, seed: int) -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    searched = FAMILIES[name].suggest(trial, data)
    for budget in ladder_budgets(1):
        policy = at_budget(name, trial.params, data, budget)
        assert isinstance(policy, BudgetConstrained)
        assert policy.mean_budget <= budget * (1 + 1e-8)
    assert at_budget(name, trial.params, data, 0.1) == searched


@pytest.mark.parametrize("step_apart", range(10))
def test_units_stay_as_far_apart_in_their_stride(data: TuningData, step_apart: int) -> None:
    for budget, stride in ((0.05, 20), (0.1, 10), (0.2, 5), (0.5, 2)):
        policy = at_budget("fixed_stride", {"phase_between_units": step_apart}, data, budget)
        assert isinstance(policy, BudgetConstrained)
        phases = np.ravel(policy.policy.phase)  # type: ignore[attr-defined]
        wanted = step_apart * stride // 10
        assert phases.tolist() == [unit * wanted % stride for unit in range(6)]


def test_references_are_half_and_twice_the_budget(data: TuningData) -> None:
    parameters = {"sharpness": 1.0, "keys_only": True}
    found = references("stride_profile", parameters, data)
    assert list(found) == ["fixed stride 20", "stride_profile at 0.05", "fixed stride 5", "stride_profile at 0.2"]
    assert found["fixed stride 5"] == FixedStride(5)
    assert found["stride_profile at 0.05"] == at_budget("stride_profile", parameters, data, 0.05)


def test_a_fixed_stride_is_its_own_reference(data: TuningData) -> None:
    assert list(references("fixed_stride", {"phase_between_units": 3}, data)) == ["fixed stride 20", "fixed stride 5"]


def test_labels_are_short() -> None:
    assert [stride_label(budget) for budget in (0.1, 0.3, 0.07, 1)] == [
        *("fixed stride 10", "fixed stride 3.333", "fixed stride 14.29", "fixed stride 1")
    ]
    assert budget_label("cosine_profile", 0.05) == "cosine_profile at 0.05"
