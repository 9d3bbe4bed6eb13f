"""A policy's program inside a kernel: straight-line code in float64, with the results that NumPy would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from policies import NotAProgram, PolicyProgram
from policies.program import Op

_SIGNAL, _CONSTANT, _TABLE, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _FLOOR_DIVIDE, _MODULO = (
    tl.constexpr(int(op))
    for op in (
        Op.SIGNAL,
        Op.CONSTANT,
        Op.TABLE,
        Op.ADD,
        Op.SUBTRACT,
        Op.MULTIPLY,
        Op.DIVIDE,
        Op.FLOOR_DIVIDE,
        Op.MODULO,
    )
)
_NEGATIVE, _ABSOLUTE, _LESS, _LESS_EQUAL, _GREATER, _GREATER_EQUAL, _EQUAL, _NOT_EQUAL = (
    tl.constexpr(int(op))
    for op in (
        Op.NEGATIVE,
        Op.ABSOLUTE,
        Op.LESS,
        Op.LESS_EQUAL,
        Op.GREATER,
        Op.GREATER_EQUAL,
        Op.EQUAL,
        Op.NOT_EQUAL,
    )
)
_AND, _OR, _XOR, _NOT, _WHERE = (tl.constexpr(int(op)) for op in (Op.AND, Op.OR, Op.XOR, Op.NOT, Op.WHERE))
# Powers with a name of their own; a kernel has no others.
_SQRT, _SQUARE, _INVERSE = tl.constexpr(100), tl.constexpr(101), tl.constexpr(102)
_POWERS = {0.5: _SQRT.value, 2.0: _SQUARE.value, -1.0: _INVERSE.value}


def kernel_code(program: PolicyProgram) -> tuple[int, ...]:
    """A program's instructions as a kernel is compiled for them, four numbers each.

    Raises:
        NotAProgram: If it takes powers that kernels do not have.
    """
    code: list[int] = []
    for op, a, b, c in program.instructions.tolist():
        if op == Op.POWER:
            kind, which = program.instructions[b, :2]
            power = float(program.constants[which]) if kind == Op.CONSTANT else None
            if power not in _POWERS:
                raise NotAProgram(f"kernels take the powers 0.5, 2 and -1, not {power or 'those of a signal'}")
            op = _POWERS[power]
        code += (op, a, b, c)
    return tuple(code)


class DeviceProgram:
    """Programs of one form as a kernel takes them: the same code, and numbers of their own.

    Args:
        programs: One or more, of the same `kernel_code` and results.
        units: `(layers, kv_heads)`.
        device: Where constants and tables go.

    Attributes:
        code: The instructions, part of the kernel.
        full: The instruction whose result is the decision.
        reasons: Those whose results are the reasons, by name; as the first program names them.
        constants: float64 `(programs, n)`; not part of the kernel, so that policies of one form share it.
        tables: float64 `(programs, n, layers, kv_heads)`.
    """

    def __init__(self, programs: Sequence[PolicyProgram], units: tuple[int, int], device: torch.device) -> None:
        first = programs[0]
        self.code, self.full, self.reasons = kernel_code(first), first.full, dict(first.reasons)
        constants = np.stack([program.constants for program in programs])
        tables = np.stack([np.broadcast_to(program.tables, (len(first.tables), *units)) for program in programs])
        # A kernel's pointer needs an address, also where there is nothing to read.
        self.constants = torch.tensor(constants if constants.size else np.zeros((1, 1)), device=device)
        self.tables = torch.tensor(tables if tables.size else np.zeros((1, 1, *units)), device=device)


@triton.jit
def _exact_product(a, b):
    """a x b as a sum of two floats (T. J. Dekker, Numer. Math. 18, 1971)."""
    product = a * b
    a_high = a * 134217729.0
    a_high = a_high - (a_high - a)
    b_high = b * 134217729.0
    b_high = b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def _floor_divide(a, b):
    """Quotient and remainder as NumPy rounds them, for quotients below 2^52."""
    ratio = a / b
    product, rest = _exact_product(tl.where(ratio < 0, tl.ceil(ratio), tl.floor(ratio)), b)
    remainder = (a - product) - rest
    # Products with an infinite or a huge divisor are not finite.
    remainder = tl.where(tl.abs(a) < tl.abs(b), a, remainder)
    # The rounded ratio may have reached a whole number that the exact one is a little below: what `fmod` gives has the
    # sign of `a`, and is smaller than `b`.
    step = tl.where(a < 0, -tl.abs(b), tl.abs(b))
    remainder = tl.where((remainder != 0) & ((remainder < 0) != (a < 0)), remainder + step, remainder)
    remainder = tl.where(tl.abs(remainder) >= tl.abs(b), remainder - step, remainder)
    quotient = (a - remainder) / b
    turned = (remainder != 0) & ((remainder < 0) != (b < 0))
    quotient = tl.where(turned, quotient - 1, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1, whole)
    unknown = float("nan")
    return (
        tl.where(b == 0, ratio, whole),
        tl.where(b == 0, unknown, tl.where(turned, remainder + b, remainder)),
    )


@triton.jit
def _truth(OP: tl.constexpr, a, b):
    if OP == _LESS:
        result = a < b
    elif OP == _LESS_EQUAL:
        result = a <= b
    elif OP == _GREATER:
        result = a > b
    elif OP == _GREATER_EQUAL:
        result = a >= b
    elif OP == _EQUAL:
        result = a == b
    elif OP == _NOT_EQUAL:
        result = a != b
    elif OP == _AND:
        result = (a != 0) & (b != 0)
    elif OP == _OR:
        result = (a != 0) | (b != 0)
    elif OP == _XOR:
        result = (a != 0) != (b != 0)
    else:
        result = a == 0
    return result.to(tl.float64)


@triton.jit
def _result(OP: tl.constexpr, a, b, c):
    """What an operator makes of its operands; truth is 1 and falsehood 0."""
    if OP == _ADD:
        result = a + b
    elif OP == _SUBTRACT:
        result = a - b
    elif OP == _MULTIPLY:
        result = a * b
    elif OP == _DIVIDE:
        result = a / b
    elif OP == _FLOOR_DIVIDE:
        result = _floor_divide(a, b)[0]
    elif OP == _MODULO:
        result = _floor_divide(a, b)[1]
    elif OP == _SQRT:
        result = tl.sqrt(a)
    elif OP == _SQUARE:
        result = a * a
    elif OP == _INVERSE:
        result = 1.0 / a
    elif OP == _NEGATIVE:
        result = -a
    elif OP == _ABSOLUTE:
        result = tl.abs(a)
    elif OP == _WHERE:
        result = tl.where(a != 0, b, c)
    else:
        result = _truth(OP, a, b)
    return result


@triton.jit
def _step(
    registers,
    signals,
    constants,
    tables,
    n_all_units,
    n_table_units,
    OP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    if OP == _SIGNAL:
        result = tl.load(signals + A * n_all_units)
    elif OP == _CONSTANT:
        result = tl.load(constants + A)
    elif OP == _TABLE:
        result = tl.load(tables + A * n_table_units)
    else:
        result = _result(OP, registers[A], registers[B], registers[C])
    return result


@triton.jit
def run_program(
    signals,
    constants,
    tables,
    n_all_units,
    n_table_units,
    CODE: tl.constexpr,
):
    """Run a program for one unit: the results of all its instructions, float64.

    Sums and products must not be fused (`enable_fp_fusion=False` at the launch), or they round otherwise than NumPy's.

    Args:
        signals: float64: the unit's number in the first signal's array.
        constants: float64.
        tables: float64: the unit's number in the first table.
        n_all_units: From one signal to the next.
        n_table_units: From one table to the next.
        CODE: Of a `DeviceProgram`.
    """
    registers = ()
    for i in tl.static_range(len(CODE) // 4):
        registers = registers + (  # type: ignore[assignment]  # noqa: RUF005 - a kernel has no unpacking.
            _step(
                registers,
                signals,
                constants,
                tables,
                n_all_units,
                n_table_units,
                CODE[4 * i],
                CODE[4 * i + 1],
                CODE[4 * i + 2],
                CODE[4 * i + 3],
            ),
        )
    return registers
