"""What instructions do for many units is what NumPy does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import Op
from policies.compiled.operations import prepare, run

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)
OF_NUMBERS: dict[Op, Callable[[Any, Any], Any]] = {
    Op.ADD: operator.add,
    Op.SUBTRACT: operator.sub,
    Op.MULTIPLY: operator.mul,
    Op.DIVIDE: operator.truediv,
    Op.FLOOR_DIVIDE: operator.floordiv,
    Op.MODULO: operator.mod,
    Op.LESS: operator.lt,
    Op.LESS_EQUAL: operator.le,
    Op.GREATER: operator.gt,
    Op.GREATER_EQUAL: operator.ge,
    Op.EQUAL: operator.eq,
    Op.NOT_EQUAL: operator.ne,
}


def ran(op: Op, *operands: np.ndarray) -> np.ndarray:
    """Results of one instruction on signals."""
    signals = np.array(operands, dtype=np.float64)
    loads = [(int(Op.SIGNAL), i, 0, 0) for i in range(len(operands))]
    places = (*range(len(operands)), 0, 0, 0)[:3]
    instructions = np.array([*loads, (int(op), *places)], dtype=np.int64)
    registers = np.full((len(instructions), signals.shape[1]), np.nan)
    run(instructions, signals, registers)
    return registers[-1]


@pytest.mark.parametrize("op", OF_NUMBERS)
@settings(deadline=None)  # The first call compiles.
@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_operators_on_many_units_are_those_of_numpy(op: Op, pairs: list[tuple[float, float]]) -> None:
    left, right = np.array(pairs).T
    with np.errstate(all="ignore"):
        expected = OF_NUMBERS[op](left, right).astype(np.float64)
    found = ran(op, left, right)
    np.testing.assert_array_equal(found, expected)
    # Zero has a sign, which a quotient by it shows.
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(found)], np.signbit(expected)[~np.isnan(found)])


@settings(deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=20))
def test_signs_and_the_powers_of_features_are_those_of_numpy(values: list[float]) -> None:
    numbers = np.array(values)
    with np.errstate(all="ignore"):
        for op, expected in ((Op.NEGATIVE, -numbers), (Op.ABSOLUTE, abs(numbers))):
            np.testing.assert_array_equal(ran(op, numbers), expected)
        for exponent in (0.5, 1.0, 2.0, -1.0):
            np.testing.assert_array_equal(ran(Op.POWER, numbers, np.full_like(numbers, exponent)), numbers**exponent)


@pytest.mark.parametrize("exponent", [3.0, 1.5, 0.0])
@settings(deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=20))
def test_other_powers_are_those_of_numpy_but_for_the_last_bit(exponent: float, values: list[float]) -> None:
    numbers = np.array(values)
    # NumPy has vector code for some processors that rounds otherwise than the C library.
    with np.errstate(all="ignore"):
        found, expected = ran(Op.POWER, numbers, np.full_like(numbers, exponent)), numbers**exponent
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    np.testing.assert_array_max_ulp(found[finite], expected[finite], maxulp=1)


@pytest.mark.parametrize(
    ("op", "expected"),
    [(Op.AND, [0, 0, 0, 1]), (Op.OR, [0, 1, 1, 1]), (Op.XOR, [0, 1, 1, 0]), (Op.NOT, [1, 1, 0, 0])],
)
def test_conditions_are_zeros_and_ones(op: Op, expected: list[int]) -> None:
    left, right = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    assert ran(op, left, right).tolist() == expected


def test_where_takes_each_unit_from_its_own_side() -> None:
    assert ran(Op.WHERE, np.array([1.0, 0.0]), np.array([2.0, 3.0]), np.array([4.0, 5.0])).tolist() == [2.0, 5.0]


def test_constants_and_tables_are_written_once_and_stay() -> None:
    instructions = np.array(
        [(int(Op.CONSTANT), 0, 0, 0), (int(Op.TABLE), 1, 0, 0), (int(Op.SIGNAL), 0, 0, 0), (int(Op.ADD), 0, 1, 0)],
        dtype=np.int64,
    )
    registers = np.full((4, 2), np.nan)
    prepare(instructions, np.array([10.0]), np.array([[9.0, 9.0], [1.0, 2.0]]), registers)
    for signal in (3.0, 4.0):
        run(instructions, np.full((1, 2), signal), registers)
        assert registers.tolist() == [[10, 10], [1, 2], [signal, signal], [11, 12]]
