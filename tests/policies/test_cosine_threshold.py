from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies import CosineThreshold, StepSignals

FullSteps = Callable[..., list[int]]
SignalsOf = Callable[..., StepSignals]


def test_a_unit_runs_full_below_the_threshold_and_not_at_it(signals_of: SignalsOf) -> None:
    similarity = [0.84, 0.85, np.nextafter(0.85, 0), 0.9, 1, -1]
    full = CosineThreshold(0.85).decide(signals_of(query_similarity=similarity))
    assert full.tolist() == [True, False, True, False, False, True]


def test_a_threshold_of_minus_one_never_runs_full(full_steps: FullSteps) -> None:
    assert full_steps(CosineThreshold(-1), 3, np.full((3, 1), -1.0)) == []


def test_the_similarity_is_looked_at_every_few_steps_only(full_steps: FullSteps) -> None:
    turned_away = np.zeros((20, 1))
    assert full_steps(CosineThreshold(0.85, check_every=5), 20, turned_away) == [4, 9, 14, 19]
    only_between_looks = np.where(np.arange(20) % 5 == 4, 1.0, 0.0)[:, None]
    assert full_steps(CosineThreshold(0.85, check_every=5), 20, only_between_looks) == []


def test_looks_every_two_and_a_half_steps_alternate(full_steps: FullSteps) -> None:
    assert full_steps(CosineThreshold(0.85, check_every=2.5), 10, np.zeros((10, 1))) == [2, 4, 7, 9]


def test_an_unmeasured_similarity_runs_full_also_between_looks(full_steps: FullSteps) -> None:
    assert full_steps(CosineThreshold(0.85, check_every=5), 6) == [0, 1, 2, 3, 4, 5]


def test_every_unit_has_its_own_threshold_and_looks(signals_of: SignalsOf) -> None:
    policy = CosineThreshold(((0.2, 0.6), (0.6, 0.6)), check_every=((1, 1), (4, 5)))
    at_step_3 = signals_of(step=np.full((1, 2, 2), 3), query_similarity=0.5)
    assert policy.decide(at_step_3).tolist() == [[[False, True], [True, False]]]
    in_layer_1 = signals_of(step=np.full((1, 2), 3), query_similarity=0.5, layer=1)
    assert policy.decide(in_layer_1).tolist() == [[True, False]]


@pytest.mark.parametrize("threshold", [1.01, -1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be between -1 and 1, not "):
        CosineThreshold(threshold)


def test_looking_more_than_once_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"check_every must be at least 1, not 0\."):
        CosineThreshold(0.5, check_every=0)
