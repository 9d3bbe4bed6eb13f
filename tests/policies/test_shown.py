from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.shown import MOST_CHARACTERS, sentence, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(10, 80))
def test_a_value_is_shown_in_so_many_characters(value: Any, most: int) -> None:
    assert len(shown(value, most)) <= most


@pytest.mark.parametrize("value", ["x" * 10**6, [[0] * 1000] * 1000, {"a" * 10**6: 1}, np.zeros(10**6)])
def test_a_large_value_is_shown_short(value: Any) -> None:
    assert len(shown(value)) <= 60


@pytest.mark.parametrize("value", [3, "x", [1, 2], {"a": 1}, None])
def test_a_small_value_is_shown_whole(value: Any) -> None:
    assert shown(value) == repr(value)


def test_a_number_too_long_to_be_written_is_shown_by_its_type() -> None:
    assert shown(10**10_000) == "<int>"


@given(st.text(max_size=1000))
def test_a_refusal_keeps_its_beginning_and_its_end(text: str) -> None:
    cut = sentence(text)
    assert len(cut) <= MOST_CHARACTERS
    assert (cut[:100], cut[-100:]) == (text[:100], text[-100:])
    assert (cut == text) == (len(text) <= MOST_CHARACTERS)
