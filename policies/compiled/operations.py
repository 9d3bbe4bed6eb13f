"""What the instructions of a `PolicyProgram` do, for one unit and for many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from policies.compiled.kernel import PROGRAM_SOURCES, digest_of, stamped_kernel
from policies.program import Op

# Enumerations are slow to compile; whole numbers are not.
SIGNAL, CONSTANT, TABLE, _ADD, _SUBTRACT, _MULTIPLY = (
    int(op) for op in (Op.SIGNAL, Op.CONSTANT, Op.TABLE, Op.ADD, Op.SUBTRACT, Op.MULTIPLY)
)
_DIVIDE, _FLOOR_DIVIDE, _MODULO, _POWER, _NEGATIVE, _ABSOLUTE = (
    int(op) for op in (Op.DIVIDE, Op.FLOOR_DIVIDE, Op.MODULO, Op.POWER, Op.NEGATIVE, Op.ABSOLUTE)
)
_LESS, _LESS_EQUAL, _GREATER, _GREATER_EQUAL, _EQUAL, _NOT_EQUAL = (
    int(op) for op in (Op.LESS, Op.LESS_EQUAL, Op.GREATER, Op.GREATER_EQUAL, Op.EQUAL, Op.NOT_EQUAL)
)
_AND, _OR, _XOR, _NOT, _WHERE = (int(op) for op in (Op.AND, Op.OR, Op.XOR, Op.NOT, Op.WHERE))


@njit(error_model="numpy", nogil=True)
def prepare(instructions: Any, constants: Any, tables: Any, registers: Any) -> None:
    """Write what is the same at every step: constants and tables; see `run`."""
    for i in range(instructions.shape[0]):
        op, a = instructions[i, 0], instructions[i, 1]
        if op == CONSTANT:
            registers[i] = constants[a]
        elif op == TABLE:
            registers[i] = tables[a]


@njit(error_model="numpy", nogil=True)
def result(op: int, a: float, b: float, c: float) -> float:
    """What an operator makes of its operands, as NumPy would; truth is 1 and falsehood 0."""
    if op == _ADD:
        return a + b
    if op == _SUBTRACT:
        return a - b
    if op == _MULTIPLY:
        return a * b
    if op == _DIVIDE:
        return a / b
    if op == _FLOOR_DIVIDE:
        return _floor_divide(a, b)[0]
    if op == _MODULO:
        return _floor_divide(a, b)[1]
    if op == _POWER:
        return _power(a, b)
    if op == _NEGATIVE:
        return -a
    if op == _ABSOLUTE:
        return abs(a)
    if op == _WHERE:
        return b if a != 0 else c
    return 1.0 if _truth(op, a, b) else 0.0


@njit(error_model="numpy", nogil=True)
def _truth(op: int, a: float, b: float) -> bool:
    if op == _LESS:
        return a < b
    if op == _LESS_EQUAL:
        return a <= b
    if op == _GREATER:
        return a > b
    if op == _GREATER_EQUAL:
        return a >= b
    if op == _EQUAL:
        return a == b
    if op == _NOT_EQUAL:
        return a != b
    if op == _AND:
        return a != 0 and b != 0
    if op == _OR:
        return a != 0 or b != 0
    if op == _XOR:
        return (a != 0) != (b != 0)
    return op == _NOT and a == 0


@njit(error_model="numpy", nogil=True)
def _floor_divide(a: float, b: float) -> tuple[float, float]:
    """Quotient and remainder as NumPy rounds them."""
    remainder = np.fmod(a, b)
    if b == 0:
        return a / b, remainder
    quotient = (a - remainder) / b
    if remainder == 0:
        remainder = math.copysign(0.0, b)
    elif (b < 0) != (remainder < 0):
        remainder += b
        quotient -= 1
    if quotient == 0:
        return math.copysign(0.0, a / b), remainder
    # Not `math.floor`, which goes through whole numbers and has none for infinity and NaN.
    floor = np.floor(quotient)
    return (floor + 1.0 if quotient - floor > 0.5 else floor), remainder


@njit(error_model="numpy", nogil=True)
def _power(a: float, b: float) -> float:
    # NumPy has short cuts for these, which round better than the general way.
    if b == 0.5:
        return math.sqrt(a)
    if b == 2:
        return a * a
    if b == -1:
        return 1 / a
    return math.pow(a, b)


def _for_units(op: int) -> Any:
    """One operator for all units: with `op` known to the compiler, the loop becomes vector instructions."""

    @njit(error_model="numpy", nogil=True)
    def for_units(left: Any, right: Any, other: Any, out: Any) -> None:
        for unit in range(out.shape[0]):
            out[unit] = result(op, left[unit], right[unit], other[unit])

    return for_units


_add, _subtract, _multiply, _divide, _negative, _absolute = map(
    _for_units, (_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _NEGATIVE, _ABSOLUTE)
)
_less, _less_equal, _greater, _greater_equal, _equal, _not_equal = map(
    _for_units, (_LESS, _LESS_EQUAL, _GREATER, _GREATER_EQUAL, _EQUAL, _NOT_EQUAL)
)
_and, _or, _not, _where = map(_for_units, (_AND, _OR, _NOT, _WHERE))


@stamped_kernel(digest_of(PROGRAM_SOURCES), nogil=True)
def run(instructions: Any, signals: Any, registers: Any) -> None:
    """Run a program for some units at once, after `prepare`.

    Args:
        instructions: As in `PolicyProgram`.
        signals: float64 `(signals, units)`, in the order of `SIGNALS`.
        registers: float64 `(instructions, units)`: gets every instruction's result.
    """
    for i in range(instructions.shape[0]):
        op, a = instructions[i, 0], instructions[i, 1]
        if op in (CONSTANT, TABLE):
            continue
        out = registers[i]
        if op == SIGNAL:
            for unit in range(out.shape[0]):
                out[unit] = signals[a, unit]
            continue
        left, right, other = registers[a], registers[instructions[i, 2]], registers[instructions[i, 3]]
        if op == _ADD:
            _add(left, right, other, out)
        elif op == _SUBTRACT:
            _subtract(left, right, other, out)
        elif op == _MULTIPLY:
            _multiply(left, right, other, out)
        elif op == _DIVIDE:
            _divide(left, right, other, out)
        elif op == _NEGATIVE:
            _negative(left, right, other, out)
        elif op == _ABSOLUTE:
            _absolute(left, right, other, out)
        elif op == _LESS:
            _less(left, right, other, out)
        elif op == _LESS_EQUAL:
            _less_equal(left, right, other, out)
        elif op == _GREATER:
            _greater(left, right, other, out)
        elif op == _GREATER_EQUAL:
            _greater_equal(left, right, other, out)
        elif op == _EQUAL:
            _equal(left, right, other, out)
        elif op == _NOT_EQUAL:
            _not_equal(left, right, other, out)
        elif op == _AND:
            _and(left, right, other, out)
        elif op == _OR:
            _or(left, right, other, out)
        elif op == _NOT:
            _not(left, right, other, out)
        elif op == _WHERE:
            _where(left, right, other, out)
        else:
            for unit in range(out.shape[0]):
                out[unit] = result(op, left[unit], right[unit], other[unit])
