from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import optuna
import pytest
from optuna.trial import FixedTrial

from policies import FixedStride, StepPolicy
from traces import Trace
from tuning import FAMILIES, TraceBatch, TuningData
from tuning.certify.certificate import KlLimit
from tuning.confirm.comparison import compare_ladder, compare_winners
from tuning.confirm.results import Measured
from tuning.confirm.winners import Winner
from tuning.families.other_budgets import at_budget
from tuning.search.study import Candidate, Search

MakeTrace = Callable[..., Trace]

N_PROMPTS = 24
PARAMETERS = {"stride_profile": {"sharpness": 1.2, "keys_only": False}, "fixed_stride": {"phase_between_units": 3}}


@dataclass
class HeldOut:
    """Prompts on which a KL of so many nats is lost per label, and what was asked of them."""

    kl: Mapping[str, float]
    asked: list[dict[str, StepPolicy]] = field(default_factory=list)

    def measure(self, policies: Mapping[str, StepPolicy]) -> dict[str, Measured]:
        self.asked.append(dict(policies))
        share = np.full(N_PROMPTS, 0.1)
        return {
            label: Measured(
                label,
                policy,
                0.1,
                0.9,
                np.full(N_PROMPTS, self.kl.get(label, 0.5)),
                share,
                share,
                share,
                np.ones((2, 3)),
            )
            for label, policy in policies.items()
        }


@pytest.fixture(scope="module")
def data(make_trace: MakeTrace) -> TuningData:
    traces = TraceBatch([make_trace(name, n_steps=8, units=(2, 3), seed=n) for n, name in enumerate("ab")])
    return TuningData(traces, 0.1, np.ones((2, 3)))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def winners(data: TuningData) -> list[Winner]:
    """Of two families; the second did better on the validation prompts."""
    return [
        Winner(
            Search(name, (), np.array([[0.1, 0.02]])),
            Candidate(PARAMETERS[name], FAMILIES[name].suggest(FixedTrial(PARAMETERS[name]), data), 0.02),
            tune_kl,
        )
        for name, tune_kl in (("fixed_stride", 0.4), ("stride_profile", 0.2))
    ]


def test_winners_are_measured_together_with_baseline_and_references(data: TuningData, winners: list[Winner]) -> None:
    held_out = HeldOut({"stride_profile": 0.3, "fixed_stride": 0.1})
    compared = compare_winners(held_out.measure, data, winners)
    (asked,) = held_out.asked
    assert list(asked)[:3] == ["fixed_stride", "stride_profile", "fixed stride 10"]
    assert [family.family for family in compared.families] == ["stride_profile", "fixed_stride"]
    assert [family.tune_kl for family in compared.families] == [0.2, 0.4]
    assert compared.families[0].measured.policy == winners[1].candidate.policy
    assert (compared.budget, compared.baseline.label, compared.ladder) == (0.1, "fixed stride 10", None)
    assert [other.label for other in compared.references] == list(asked)[3:]


BUDGETS = (0.5, 0.2, 0.1, 0.05)
RISING = {"stride_profile at 0.5": 0.01, "stride_profile at 0.2": 0.03, "stride_profile at 0.1": 0.2}


def test_the_best_family_is_measured_at_every_budget_beside_fixed_strides(
    data: TuningData, winners: list[Winner]
) -> None:
    held_out = HeldOut(RISING)
    compared = compare_ladder(held_out.measure, data, winners, KlLimit.of(0.1), BUDGETS, 6)
    (asked,) = held_out.asked
    assert asked == {
        f"stride_profile at {budget:g}": at_budget("stride_profile", PARAMETERS["stride_profile"], data, budget)
        for budget in BUDGETS
    } | {f"fixed stride {1 / budget:g}": FixedStride(1 / budget) for budget in BUDGETS}
    labels = [compared.families[0].measured.label, compared.baseline.label, *(one.label for one in compared.references)]
    assert sorted(labels) == sorted(asked)


def test_the_cheapest_policy_that_is_certified_is_exported(data: TuningData, winners: list[Winner]) -> None:
    compared = compare_ladder(HeldOut(RISING).measure, data, winners, KlLimit.of(0.1), BUDGETS, 6)
    (exported,) = compared.families
    assert (compared.budget, compared.baseline.label) == (0.2, "fixed stride 5")
    assert (exported.family, exported.measured.label) == ("stride_profile", "stride_profile at 0.2")
    assert exported.parameters == PARAMETERS["stride_profile"]
    assert compared.ladder is not None
    assert [rung.budget for rung in compared.ladder.rungs] == list(BUDGETS)


@pytest.mark.parametrize(("kl", "budget", "tune_kl"), [(0.02, 0.1, 0.2), (0.3, 0.2, None)])
def test_the_tuning_kl_is_only_that_of_the_budget_it_was_measured_at(
    data: TuningData, winners: list[Winner], kl: float, budget: float, tune_kl: float | None
) -> None:
    held_out = HeldOut(RISING | {"stride_profile at 0.1": kl})
    compared = compare_ladder(held_out.measure, data, winners, KlLimit.of(0.1), BUDGETS, 6)
    assert (compared.budget, compared.families[0].tune_kl) == (budget, tune_kl)


def test_where_nothing_is_certified_nothing_is_exported(data: TuningData, winners: list[Winner]) -> None:
    with pytest.raises(ValueError, match=r"no policy below full attention certifies .* of stride_profile at 0.5, "):
        compare_ladder(HeldOut({}).measure, data, winners, KlLimit.of(0.1), BUDGETS, 6)
