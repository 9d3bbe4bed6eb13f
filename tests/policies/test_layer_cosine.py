from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from policies import LayerCosine, Schedule, StepSignals

SignalsOf = Callable[..., StepSignals]


def full_steps(policy: LayerCosine, similarity: list[float]) -> list[int]:
    schedule, found = Schedule(np.zeros(1)), []
    for step, cosine in enumerate(similarity):
        full = policy.decide(schedule.signals(layer_similarity=np.array([cosine])))
        schedule.advance(full)
        found += [step] * bool(full)
    return found


def test_a_layer_runs_full_below_the_threshold_and_not_at_it(signals_of: SignalsOf) -> None:
    similarity = [0.84, 0.85, np.nextafter(0.85, 0), 0.9, 1, -1]
    full = LayerCosine(0.85, check_every=1).decide(signals_of(layer_similarity=similarity))
    assert full.tolist() == [True, False, True, False, False, True]


def test_by_hand_the_third_and_the_sixth_step_are_looked_at(signals_of: SignalsOf) -> None:
    # Looks at steps 2, 5 and 8; at 5 the layer's query is near enough, elsewhere nobody looks.
    assert full_steps(LayerCosine(0.8, check_every=3), [0.1, 0.1, 0.7, 0.1, 0.1, 0.8, 0.1, 0.1, 0.79]) == [2, 8]


def test_the_similarity_of_units_is_not_asked_for(signals_of: SignalsOf) -> None:
    assert LayerCosine(0.5).needs == {"layer_similarity"}
    assert not LayerCosine(0.5, 1).decide(signals_of(layer_similarity=0.6, query_similarity=-1, step_similarity=-1))[0]


def test_an_unmeasured_similarity_runs_full_also_between_looks() -> None:
    assert full_steps(LayerCosine(0.85, check_every=5), [float("nan")] * 4) == [0, 1, 2, 3]


def test_every_layer_may_have_its_own_threshold(signals_of: SignalsOf) -> None:
    policy = LayerCosine(((0.2, 0.2), (0.6, 0.6)), check_every=1)
    assert policy.decide(signals_of(layer_similarity=np.full((1, 2, 2), 0.5))).tolist() == [[[False] * 2, [True] * 2]]


@pytest.mark.parametrize("threshold", [1.01, -1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be between -1 and 1, not "):
        LayerCosine(threshold)


def test_looking_more_than_once_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"check_every must be at least 1, not 0\."):
        LayerCosine(0.5, check_every=0)
