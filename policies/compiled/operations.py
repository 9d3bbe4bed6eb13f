"""What the instructions of a `PolicyProgram` do, for one unit and for many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from policies.compiled.kernel import PROGRAM_SOURCES, digest_of, helper, stamped_kernel
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
_SOURCES = digest_of(PROGRAM_SOURCES)


@stamped_kernel(_SOURCES)
def prepare(instructions: Any, constants: Any, tables: Any, registers: Any) -> None:
    """Write what is the same at every step: constants and tables; see `run`."""
    for i in range(instructions.shape[0]):
        op, a = instructions[i, 0], instructions[i, 1]
        if op in (CONSTANT, TABLE):
            # Loops: for slices numba compiles what it would say of their shapes, for seconds.
            for unit in range(registers.shape[1]):
                registers[i, unit] = constants[a] if op == CONSTANT else tables[a, unit]


@helper()
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


@helper()
def _power(a: float, b: float) -> float:
    # NumPy has short cuts for these, which round better than the general way.
    if b == 0.5:
        return math.sqrt(a)
    if b == 2:
        return a * a
    if b == -1:
        return 1 / a
    return math.pow(a, b)


@stamped_kernel(_SOURCES, nogil=True)
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
        n = out.shape[0]
        if op == SIGNAL:
            for unit in range(n):
                out[unit] = signals[a, unit]
            continue
        left, right, other = registers[a], registers[instructions[i, 2]], registers[instructions[i, 3]]
        if op == _ADD:
            for unit in range(n):
                out[unit] = left[unit] + right[unit]
        elif op == _SUBTRACT:
            for unit in range(n):
                out[unit] = left[unit] - right[unit]
        elif op == _MULTIPLY:
            for unit in range(n):
                out[unit] = left[unit] * right[unit]
        elif op == _DIVIDE:
            for unit in range(n):
                out[unit] = left[unit] / right[unit]
        elif op == _FLOOR_DIVIDE:
            for unit in range(n):
                out[unit] = _floor_divide(left[unit], right[unit])[0]
        elif op == _MODULO:
            for unit in range(n):
                out[unit] = _floor_divide(left[unit], right[unit])[1]
        elif op == _POWER:
            for unit in range(n):
                out[unit] = _power(left[unit], right[unit])
        elif op == _NEGATIVE:
            for unit in range(n):
                out[unit] = -left[unit]
        elif op == _ABSOLUTE:
            for unit in range(n):
                out[unit] = abs(left[unit])
        elif op == _LESS:
            for unit in range(n):
                out[unit] = left[unit] < right[unit]
        elif op == _LESS_EQUAL:
            for unit in range(n):
                out[unit] = left[unit] <= right[unit]
        elif op == _GREATER:
            for unit in range(n):
                out[unit] = left[unit] > right[unit]
        elif op == _GREATER_EQUAL:
            for unit in range(n):
                out[unit] = left[unit] >= right[unit]
        elif op == _EQUAL:
            for unit in range(n):
                out[unit] = left[unit] == right[unit]
        elif op == _NOT_EQUAL:
            for unit in range(n):
                out[unit] = left[unit] != right[unit]
        elif op == _AND:
            for unit in range(n):
                out[unit] = (left[unit] != 0) & (right[unit] != 0)
        elif op == _OR:
            for unit in range(n):
                out[unit] = (left[unit] != 0) | (right[unit] != 0)
        elif op == _XOR:
            for unit in range(n):
                out[unit] = (left[unit] != 0) != (right[unit] != 0)
        elif op == _NOT:
            for unit in range(n):
                out[unit] = left[unit] == 0
        elif op == _WHERE:
            for unit in range(n):
                # Both are read, whichever is taken: a condition on what is read does not vectorise.
                one, another = right[unit], other[unit]
                out[unit] = one if left[unit] != 0 else another
