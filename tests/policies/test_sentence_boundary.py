from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from policies import Schedule, SentenceBoundary, StepSignals, policy_from_json
from policies.sentence_boundary import MOST_TOKENS

STOP, QUESTION = 30, 47


def full_steps(policy: SentenceBoundary, tokens: list[float]) -> list[int]:
    schedule, found = Schedule(np.zeros(1)), []
    for step, token in enumerate(tokens):
        full = policy.decide(schedule.signals(token=np.array([token])))
        schedule.advance(full)
        found += [step] * bool(full)
    return found


def test_by_hand_full_at_ends_of_sentences_and_four_steps_after_the_last_full_step() -> None:
    # The prompt's set is 4 steps old at step 3; a stop at 4; a question mark at 6; then nothing until 6 + 4.
    tokens = [5, 6, 7, 8, STOP, 5, QUESTION, 5, 6, 7, 8, 9]
    assert full_steps(SentenceBoundary((STOP, QUESTION), max_age=4), tokens) == [3, 4, 6, 10]


def test_an_end_of_a_sentence_too_soon_after_the_last_full_step_does_not_count() -> None:
    # At step 4 the set is 1 step old, at 6 it is 3: a stop at both; at 9 the limit of age.
    tokens = [5, 6, 7, STOP, STOP, 5, STOP, 5, 6, 7, 8]
    assert full_steps(SentenceBoundary((STOP,), max_age=4, min_age=3), tokens) == [3, 6, 10]


def test_without_ends_of_sentences_it_is_the_limit_of_age() -> None:
    assert full_steps(SentenceBoundary((STOP,)), [5.0] * 100) == [31, 63, 95]


def test_a_token_that_is_not_known_runs_full() -> None:
    assert full_steps(SentenceBoundary((STOP,)), [float("nan"), 5, float("nan")]) == [0, 2]


def test_rows_end_their_sentences_each_for_itself(signals_of: Callable[..., StepSignals]) -> None:
    signals = signals_of(age=np.ones((2, 3)), token=[[STOP] * 3, [5] * 3])
    assert SentenceBoundary((STOP,)).decide(signals).tolist() == [[True] * 3, [False] * 3]


def test_every_unit_may_have_its_own_limit_of_age(signals_of: Callable[..., StepSignals]) -> None:
    policy = SentenceBoundary((STOP,), max_age=((3, 4), (5, 6)))
    assert policy.unit_shapes() == {(2, 2)}
    assert policy.decide(signals_of(age=np.full((1, 2, 2), 4), token=5)).tolist() == [[[True, True], [False, False]]]


def test_ids_are_kept_once_and_sorted_whatever_library_they_came_from() -> None:
    policy = SentenceBoundary(np.array([7, 3, 7]))  # type: ignore[arg-type]
    assert policy == SentenceBoundary((3, 7)) == SentenceBoundary([7, 3])  # type: ignore[arg-type]
    assert [type(token) for token in policy.tokens] == [int, int]


def test_ids_are_no_parameters_of_units() -> None:
    assert SentenceBoundary((3, 7)).unit_shapes() == frozenset()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "tokens must name between 1 and 256 different tokens that end a sentence, not 0"),
        (range(MOST_TOKENS + 1), "between 1 and 256 different tokens that end a sentence, not 257"),
        ((3, -1), "whole numbers from 0 to .*, not -1"),
        ((3, 2.5), "whole numbers from 0 to .*, not 2.5"),
        ((True,), "whole numbers from 0 to .*, not True"),
        ("30", "whole numbers from 0 to .*, not '3'"),
        (((3, 4), (5, 6)), r"whole numbers from 0 to .*, not \(3, 4\)"),
        (30, "tokens must be several token ids, not 30"),
    ],
)
def test_what_are_no_token_ids_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceBoundary(tokens)


def test_as_many_as_may_be_are_taken() -> None:
    policy = SentenceBoundary(tuple(range(MOST_TOKENS)))
    assert full_steps(policy, [MOST_TOKENS, MOST_TOKENS - 1, 0]) == [1, 2]


def test_a_file_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks its field 'tokens'"):
        policy_from_json({"kind": "sentence_boundary"})


def test_a_set_that_is_never_used_is_no_limit() -> None:
    with pytest.raises(ValueError, match=r"max_age must be at least 1, not 0\."):
        SentenceBoundary((3,), max_age=0)
