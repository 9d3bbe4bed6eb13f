"""Running a policy's program for the units of a layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies import QUERY_SIGNALS, SIGNALS, PolicyProgram
from policies.compiled.operations import CONSTANT, SIGNAL, TABLE, result
from recycler.decode.cpu.arrays import Array, Signals
from recycler.decode.cpu.compiled import kernel

# Those of the query stand beside each other in `SIGNALS`.
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
                if op == SIGNAL:
                    if a == _QUERY_SIMILARITY:
                        value = signals.query_similarity[row, head]
                    elif a == _STEP_SIMILARITY:
                        value = signals.step_similarity[row, head]
                    elif a == _LAYER_SIMILARITY:
                        value = signals.layer_similarity[row, head]
                    else:
                        value = state[a if a < _QUERY_SIMILARITY else a - _N_QUERY_SIGNALS, row, layer, head]
                elif op == CONSTANT:
                    value = program.constants[a]
                elif op == TABLE:
                    value = program.tables[a, layer, head]
                else:
                    b, c = program.instructions[i, 2], program.instructions[i, 3]
                    value = result(op, program.registers[a], program.registers[b], program.registers[c])
                program.registers[i] = value
            for i in range(program.results.shape[0]):
                decisions[i, layer, row, head] = program.registers[program.results[i]] != 0
