"""Running a policy's program for the units of a layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from policies import SIGNALS, Op, PolicyProgram
from recycler.cpu.arrays import Array, Signals
from recycler.cpu.compiled import kernel

# Enumerations are slow to compile; whole numbers are not.
_SIGNAL, _CONSTANT, _TABLE, _ADD, _SUBTRACT, _MULTIPLY = (
    int(op) for op in (Op.SIGNAL, Op.CONSTANT, Op.TABLE, Op.ADD, Op.SUBTRACT, Op.MULTIPLY)
)
_DIVIDE, _FLOOR_DIVIDE, _MODULO, _POWER, _NEGATIVE, _ABSOLUTE = (
    int(op) for op in (Op.DIVIDE, Op.FLOOR_DIVIDE, Op.MODULO, Op.POWER, Op.NEGATIVE, Op.ABSOLUTE)
)
_LESS, _LESS_EQUAL, _GREATER, _GREATER_EQUAL, _EQUAL, _NOT_EQUAL = (
    int(op) for op in (Op.LESS, Op.LESS_EQUAL, Op.GREATER, Op.GREATER_EQUAL, Op.EQUAL, Op.NOT_EQUAL)
)
_AND, _OR, _XOR, _NOT, _WHERE = (int(op) for op in (Op.AND, Op.OR, Op.XOR, Op.NOT, Op.WHERE))
# What the query of the step itself makes, beside each other in `SIGNALS`; the rest is known when a step begins.
QUERY_SIGNALS = ("query_similarity", "step_similarity", "layer_similarity")
SCHEDULE_SIGNALS = tuple(name for name in SIGNALS if name not in QUERY_SIGNALS)
_QUERY_SIMILARITY, _STEP_SIMILARITY, _LAYER_SIMILARITY = (SIGNALS.index(name) for name in QUERY_SIGNALS)
_N_QUERY_SIGNALS = len(QUERY_SIGNALS)


class Program(NamedTuple):
    """A `PolicyProgram` as the kernel takes it.

    Attributes:
        instructions: As in `PolicyProgram`.
        constants: The same.
        tables: The same.
        results: int64 `(1 + reasons,)`: instructions whose results are the decision and the reasons.
        registers: float64 `(n,)`, for results of instructions.
    """

    instructions: Array
    constants: Array
    tables: Array
    results: Array
    registers: Array


def as_program(program: PolicyProgram) -> Program:
    """Bring a program into the kernel's form."""
    results = np.array([program.full, *program.reasons.values()], dtype=np.int64)
    registers = np.zeros(len(program.instructions))
    return Program(program.instructions, program.constants, program.tables, results, registers)


@kernel()
def run_program(
    program: Program, layer: int, first_row: int, last_row: int, state: Array, signals: Signals, decisions: Array
) -> None:
    """Decide for the units of some rows of a layer.

    Args:
        program: The policy.
        layer: Index of the layer.
        first_row: First row.
        last_row: One past the last.
        state: float64 `(6, rows, layers, kv_heads)`: the signals of `SCHEDULE_SIGNALS`.
        signals: Measured signals of the layer.
        decisions: bool `(1 + reasons, layers, rows, kv_heads)`: gets the decision and the reasons.
    """
    for row in range(first_row, last_row):
        for head in range(decisions.shape[3]):
            for i in range(program.instructions.shape[0]):
                op, a = program.instructions[i, 0], program.instructions[i, 1]
                if op == _SIGNAL:
                    if a == _QUERY_SIMILARITY:
                        value = signals.query_similarity[row, head]
                    elif a == _STEP_SIMILARITY:
                        value = signals.step_similarity[row, head]
                    elif a == _LAYER_SIMILARITY:
                        value = signals.layer_similarity[row, head]
                    else:
                        value = state[a if a < _QUERY_SIMILARITY else a - _N_QUERY_SIGNALS, row, layer, head]
                elif op == _CONSTANT:
                    value = program.constants[a]
                elif op == _TABLE:
                    value = program.tables[a, layer, head]
                else:
                    b, c = program.instructions[i, 2], program.instructions[i, 3]
                    value = _result(op, program.registers[a], program.registers[b], program.registers[c])
                program.registers[i] = value
            for i in range(program.results.shape[0]):
                decisions[i, layer, row, head] = program.registers[program.results[i]] != 0


@njit(error_model="numpy")
def _result(op: int, a: float, b: float, c: float) -> float:
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


@njit(error_model="numpy")
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


@njit(error_model="numpy")
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


@njit(error_model="numpy")
def _power(a: float, b: float) -> float:
    # NumPy has short cuts for these, which round better than the general way.
    if b == 0.5:
        return math.sqrt(a)
    if b == 2:
        return a * a
    if b == -1:
        return 1 / a
    return math.pow(a, b)
