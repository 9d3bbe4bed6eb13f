from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    MaxAge,
    ModelShape,
    RefreshKeys,
    StepPolicy,
    StepSignals,
    check_fits,
)
from policies.arrays import Array

TWO_BY_THREE = ((1, 2, 3), (4, 5, 6))
ONE_BY_TWO = ((0.1, 0.2),)


@dataclass(frozen=True)
class AnyOf(StepPolicy):
    """Several inner policies in one field, as a plug-in may have them."""

    policies: tuple[StepPolicy, ...]
    kind: ClassVar[str] = "any_of"

    def decide(self, signals: StepSignals) -> Array:
        full = signals.age < 0
        for policy in self.policies:
            full = full | policy.decide(signals)
        return full


def test_without_decide_there_is_no_policy() -> None:
    with pytest.raises(TypeError, match="abstract"):
        StepPolicy()  # type: ignore[abstract]


def test_a_policy_that_is_no_dataclass_is_told_what_is_missing(model: ModelShape) -> None:
    class Undecorated(StepPolicy):
        def decide(self, signals: StepSignals) -> Array:
            return signals.age >= 3

    with pytest.raises(TypeError, match=r"^Undecorated must be a frozen dataclass: write @dataclass"):
        check_fits(Undecorated(), model)


def test_a_policy_needs_no_measurement_unless_it_says_so() -> None:
    assert AnyOf(()).needs == frozenset()


def test_shapes_are_gathered_from_inner_policies_at_any_depth() -> None:
    nested = BudgetConstrained(MaxAge(FixedStride(TWO_BY_THREE), 9), 0.1)
    assert nested.unit_shapes() == {(2, 3)}
    assert AnyOf((AlwaysFull(), FixedStride(TWO_BY_THREE), nested)).unit_shapes() == {(2, 3)}
    assert BudgetConstrained(FixedStride(TWO_BY_THREE), ONE_BY_TWO).unit_shapes() == {(2, 3), (1, 2)}


def test_a_policy_whose_parts_are_for_different_models_fits_neither(model: ModelShape) -> None:
    with pytest.raises(ValueError, match="the policy is for 1 layers x 2 KV heads, but tiny has 2 layers x 3 KV heads"):
        check_fits(BudgetConstrained(FixedStride(TWO_BY_THREE), ONE_BY_TWO), model)


def test_a_wrapper_that_says_nothing_of_it_needs_and_refreshes_what_its_inner_policies_do() -> None:
    inner = RefreshKeys(CosineThreshold(0.5), ((1, 0, 1), (0, 0, 1)))
    assert AnyOf((inner,)).keys_only == inner.keys_only
    assert AnyOf((inner,)).needs == {"query_similarity"}
    assert AnyOf((inner, RefreshKeys(LayerCosine(0.5), inner.units))).needs == {"query_similarity", "layer_similarity"}
    assert AnyOf((AlwaysFull(), MaxAge(FixedStride(2), 4))).keys_only == AnyOf(()).keys_only == 0


def test_inner_policies_that_refresh_in_different_ways_have_no_way_in_common() -> None:
    with pytest.raises(ValueError, match=r"^the policies inside of any_of refresh their sets in different ways\.$"):
        _ = AnyOf((RefreshKeys(AlwaysFull()), AlwaysFull())).keys_only
