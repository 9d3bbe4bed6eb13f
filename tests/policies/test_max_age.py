from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from policies import AlwaysFull, CosineThreshold, FixedStride, MaxAge, NeverFull, StepSignals

FullSteps = Callable[..., list[int]]
SignalsOf = Callable[..., StepSignals]


def test_a_unit_that_never_asks_runs_full_whenever_its_set_is_too_old(full_steps: FullSteps) -> None:
    assert full_steps(MaxAge(NeverFull(), 3), 10) == [2, 5, 8]


def test_an_age_of_one_is_always_too_old(full_steps: FullSteps) -> None:
    assert full_steps(MaxAge(NeverFull(), 1), 4) == [0, 1, 2, 3]


def test_age_counts_from_the_last_full_step_whoever_asked_for_it(full_steps: FullSteps) -> None:
    # The inner policy asks at 6 and 13; three steps after a full step the set is too old.
    assert full_steps(MaxAge(FixedStride(7), 3), 15) == [2, 5, 6, 9, 12, 13]


def test_only_a_step_that_it_forced_is_noted(signals_of: SignalsOf) -> None:
    reasons: dict[str, Any] = {}
    signals = signals_of(age=[2, 2, 3, 3], query_similarity=[0.9, 0.1, 0.9, 0.1], reasons=reasons)
    assert MaxAge(CosineThreshold(0.5), 3).decide(signals).tolist() == [False, True, True, True]
    assert {reason: units.tolist() for reason, units in reasons.items()} == {"max_age": [False, False, True, False]}


def test_a_missing_signal_runs_full_without_being_forced(signals_of: SignalsOf) -> None:
    reasons: dict[str, Any] = {}
    assert MaxAge(CosineThreshold(0.5), 9).decide(signals_of(query_similarity=np.nan, reasons=reasons)).all()
    assert not reasons["max_age"].any()


def test_every_unit_has_its_own_age(signals_of: SignalsOf) -> None:
    signals = signals_of(age=np.full((1, 2, 2), 3))
    assert MaxAge(NeverFull(), ((2, 3), (4, 5))).decide(signals).tolist() == [[[True, True], [False, False]]]


def test_it_needs_what_the_inner_policy_needs() -> None:
    assert MaxAge(CosineThreshold(0.5), 3).needs == {"query_similarity"}
    assert MaxAge(NeverFull(), 3).needs == frozenset()


def test_an_age_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_age must be at least 1, not 0\."):
        MaxAge(AlwaysFull(), 0)
