from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from policies import AlwaysFull, FixedStride, NeverFull
from traces import Trace
from tuning import TraceBatch, replay_policy
from tuning.confirm.measured import measured

MakeTrace = Callable[..., Trace]

UNITS = (1, 2)


@dataclass
class Run:
    """A closed-loop run of two policies over four steps."""

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray


RUNS = [
    Run(
        kl=np.array([[0.0, 0.1, 0.2, 0.1], [1, 2, 3, 2]]),
        agreement=np.array([[True, True, True, False], [False, False, False, True]]),
        # The last step has no next token, and is never right.
        accuracy=np.array([[True, True, False, False], [False, False, False, False]]),
        full=np.array([[[[1, 1]], [[0, 1]], [[1, 1]], [[0, 1]]], [[[0, 0]], [[0, 0]], [[0, 0]], [[0, 1]]]], dtype=bool),
    ),
    Run(
        kl=np.array([[0.3, 0.3, 0.3, 0.3], [0, 0, 0, 4]]),
        agreement=np.array([[True, True, True, True], [False, True, False, True]]),
        accuracy=np.array([[True, True, True, False], [True, False, False, False]]),
        full=np.array([[[[0, 0]], [[0, 0]], [[0, 0]], [[0, 1]]], [[[1, 1]], [[1, 1]], [[1, 1]], [[1, 1]]]], dtype=bool),
    ),
]


@pytest.fixture
def traces(make_trace: MakeTrace) -> TraceBatch:
    return TraceBatch([make_trace(name, n_steps=4, units=UNITS, seed=seed) for seed, name in enumerate("ab")])


def test_closed_loop_is_averaged_over_the_steps_of_each_prompt(traces: TraceBatch) -> None:
    first, second = measured(["some", "none"], [FixedStride(2), NeverFull()], traces, RUNS)
    np.testing.assert_allclose(first.prompt_kl, [0.1, 0.3])
    np.testing.assert_allclose(second.prompt_kl, [2, 1])
    np.testing.assert_allclose(first.prompt_agreement, [0.75, 1])
    np.testing.assert_allclose(second.prompt_agreement, [0.25, 0.5])
    np.testing.assert_allclose(first.prompt_full_share, [6 / 8, 1 / 8])
    assert first.full_share == pytest.approx(7 / 16)
    np.testing.assert_allclose(first.unit_full_share, [[2 / 8, 5 / 8]])
    np.testing.assert_allclose(second.unit_full_share, [[4 / 8, 5 / 8]])


def test_the_last_step_counts_in_agreement_and_not_in_accuracy(traces: TraceBatch) -> None:
    first, second = measured(["some", "none"], [FixedStride(2), NeverFull()], traces, RUNS)
    np.testing.assert_allclose(first.prompt_accuracy, [2 / 3, 1])
    np.testing.assert_allclose(second.prompt_accuracy, [0, 1 / 3])


def test_replay_is_that_of_the_policy_on_the_same_prompts(traces: TraceBatch) -> None:
    policies = [FixedStride(2), AlwaysFull()]
    found = measured(["some", "all"], policies, traces, RUNS)
    for one, policy in zip(found, policies, strict=True):
        replay = replay_policy(traces, policy)
        assert (one.replay_full_share, one.recovered_mass) == (replay.full_share, replay.recovered_mass)
    assert [(one.label, one.policy) for one in found] == [("some", policies[0]), ("all", policies[1])]


def test_every_policy_needs_a_label(traces: TraceBatch) -> None:
    with pytest.raises(ValueError, match="zip"):
        measured(["some"], [FixedStride(2), AlwaysFull()], traces, RUNS)
