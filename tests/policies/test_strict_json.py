from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.strict_json import MOST_LEVELS, MOST_VALUES, check_plain_file, json_problem, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_within_bounds_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "values.json"
    path.write_text(json.dumps(values))
    assert read_json(path) == values
    assert json_problem(values) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ("[1e-400]", "'1e-400' is too small for a float64"),
        ("1" * 5000, "is not JSON: Exceeds the limit"),
        ("\ufeff{}", "is not JSON: "),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "values.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_json(path)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="is larger than 8 bytes"):
        read_json(path, most_bytes=8)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"a": [float("nan")]}, "nan is no number of JSON"),
        ([float("-inf")], "-inf is no number of JSON"),
        ([2**53 + 1], "the whole number 9007199254740993 is beyond 2**53"),
        ([0] * MOST_VALUES, "it holds more than 200,000 values"),
    ],
)
def test_values_beyond_bounds_are_named(values: Any, problem: str) -> None:
    assert json_problem(values) == problem


def test_values_may_nest_so_deep_and_no_deeper() -> None:
    values: Any = 1
    for _ in range(MOST_LEVELS - 1):
        values = [values]
    assert json_problem(values) is None
    assert json_problem([values]) == "it is nested deeper than 32 levels"


def test_a_fifo_and_a_device_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"^{path} is no ordinary file"):
            read_json(path)
    check_plain_file(tmp_path / "not there")
