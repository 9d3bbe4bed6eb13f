from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies import LearnedLogistic, as_per_unit
from policies.per_unit import numbers, unit_shape


def of(value: Any, low: float = 0, high: float = 10) -> Any:
    return as_per_unit("depth", value, low, high)


def test_a_number_stays_what_it_is() -> None:
    assert (of(3), type(of(3))) == (3, int)
    assert (of(2.5), type(of(2.5))) == (2.5, float)


@pytest.mark.parametrize("value", [np.float32(2.5), np.float64(2.5), np.array(2.5)])
def test_a_numpy_number_becomes_a_plain_one(value: Any) -> None:
    assert (of(value), type(of(value))) == (2.5, float)


@pytest.mark.parametrize("value", [[[1, 2.5], [0, 10]], ((1, 2.5), (0, 10)), np.array([[1, 2.5], [0, 10]])])
def test_a_table_becomes_tuples_of_plain_floats(value: Any) -> None:
    assert of(value) == ((1.0, 2.5), (0.0, 10.0))
    assert {type(number) for row in of(value) for number in row} == {float}
    assert hash(of(value)) == hash(((1, 2.5), (0, 10)))


@pytest.mark.parametrize(
    "value", ["3", True, [1, 2], [], [[]], [[1, 2], [3]], [[[1]]], {"a": 1}, object(), [["x"]], np.ones((2, 2, 2))]
)
def test_what_is_neither_a_number_nor_a_table_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="depth must be one number, or a table with one row per layer and one column"):
        of(value)


def test_a_long_value_is_cut_short_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"not \[0, 0, .*\.\.\.\]\.$") as error:
        of([0] * 1000)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("value", "named"), [(-1, "-1"), (11, "11"), (float("nan"), "nan"), ([[1, 2], [3, 12]], "12")])
def test_a_number_out_of_range_is_refused_with_the_range(value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"depth must be between 0 and 10, not {named}\."):
        of(value)


def test_infinity_is_refused_also_where_there_is_no_upper_bound() -> None:
    with pytest.raises(ValueError, match=r"depth must be at least 1, not inf\."):
        of([[1, float("inf")]], 1, float("inf"))


def test_bounds_are_allowed() -> None:
    assert of([[0, 10]]) == ((0, 10),)


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [(3, None), (2.5, None), (((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), (2, 3)), (((1.0,),), (1, 1)), (("a", "b"), None)],
)
def test_the_shape_of_a_parameter_is_that_of_its_table(parameter: Any, shape: Any) -> None:
    assert unit_shape(parameter) == shape


def test_several_tables_are_not_mistaken_for_one() -> None:
    tables = (((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),)
    assert unit_shape(tables) is None
    assert LearnedLogistic(("age",), tables, 0).unit_shapes() == {(2, 3)}


def test_numbers_are_flat() -> None:
    assert list(numbers(3)) == [3]
    assert list(numbers(((1.0, 2.0), (3.0, 4.0)))) == [1, 2, 3, 4]
