"""Outcomes as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from recycler.evaluate import Outcome, PromptOutcome

FORCED = Outcome(
    kl=np.array([0.1, 1e-17, 1 / 3]),
    agreement=np.array([True, False, True]),
    accuracy=np.array([False, True]),
    nll_change=np.array([-0.25, 2 / 3]),
    full_share=0.1,
    read_share=1 / 7,
)
ANSWERED = dataclasses.replace(FORCED, answer='sieben "é"\n', score=0.5, answer_full_share=0.2, answer_read_share=1 / 9)
# One step has no next token in the text.
SHORT = Outcome(np.array([0.5]), np.array([False]), np.array([], dtype=bool), np.array([]), 1.0, 1.0)


def equal(one: Outcome, other: Outcome) -> None:
    for field in dataclasses.fields(Outcome):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert type(mine) is type(theirs), field.name
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), field.name
        np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


def through_json(outcome: PromptOutcome) -> PromptOutcome:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return PromptOutcome.from_json(json.loads(json.dumps(outcome.to_json()), parse_constant=refuse))


@pytest.mark.parametrize("methods", [{"full": FORCED}, {"full": ANSWERED, "other": FORCED}, {"short": SHORT}], ids=str)
def test_an_outcome_comes_back_from_json_bit_by_bit(methods: dict[str, Outcome]) -> None:
    before = PromptOutcome("needle-003", "needle", 1000, methods)
    after = through_json(before)
    assert (after.name, after.task, after.n_prompt_tokens) == ("needle-003", "needle", 1000)
    assert list(after.methods) == list(methods)
    for name, outcome in methods.items():
        equal(after.methods[name], outcome)
