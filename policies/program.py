"""A policy's decision written down as instructions, for decoders that cannot call Python at every layer.

A policy is made of operators and comparisons, so running it once on objects that note what is done to them gives all
that it ever does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from policies.base import StepPolicy
from policies.per_unit import PerUnit
from policies.signals import StepSignals

# Signals in the order in which a program counts them.
SIGNALS = tuple(field.name for field in fields(StepSignals) if field.type == "Array")


class NotAProgram(Exception):  # noqa: N818 - an answer, not an error: such a policy is called at every step.
    """What a policy does besides operators and comparisons on its signals."""


class Op(IntEnum):
    """What an instruction does with its operands; truth is 1 and falsehood 0."""

    SIGNAL = 0
    CONSTANT = 1
    TABLE = 2
    ADD = 3
    SUBTRACT = 4
    MULTIPLY = 5
    DIVIDE = 6
    FLOOR_DIVIDE = 7
    MODULO = 8
    POWER = 9
    NEGATIVE = 10
    ABSOLUTE = 11
    LESS = 12
    LESS_EQUAL = 13
    GREATER = 14
    GREATER_EQUAL = 15
    EQUAL = 16
    NOT_EQUAL = 17
    AND = 18
    OR = 19
    XOR = 20
    NOT = 21
    WHERE = 22


@dataclass(frozen=True)
class PolicyProgram:
    """Instructions, each with one result per unit, and which of them decide.

    Attributes:
        instructions: int64 `(n, 4)`: an `Op` and its operands. Operands are results of earlier instructions, but for
            SIGNAL an index into `SIGNALS`, for CONSTANT and TABLE one into the arrays below.
        constants: float64 `(n,)`.
        tables: float64 `(n, layers, kv_heads)`.
        full: The instruction whose result is the decision.
        reasons: The instructions whose results are what `StepSignals.because` was told, by reason.
    """

    instructions: np.ndarray
    constants: np.ndarray
    tables: np.ndarray
    full: int
    reasons: Mapping[str, int]


def policy_program(policy: StepPolicy) -> PolicyProgram:
    """Write a policy's decision down.

    Raises:
        NotAProgram: If it is not made of operators and comparisons, or asks for the truth of an array.
    """
    notes = _Notes()
    signals = {name: notes.add(Op.SIGNAL, index) for index, name in enumerate(SIGNALS)}
    reasons: dict[str, Any] = {}
    try:
        full = policy.decide(_NotedSignals(**signals, layer=_AnyLayer(), reasons=reasons))  # type: ignore[arg-type]
    except Exception as error:
        # Whatever another author's code does with arrays that are none; what is wrong with it shows when it is called.
        raise NotAProgram(f"{type(error).__name__}: {error}") from error
    for result in (full, *reasons.values()):
        if not (isinstance(result, _Noted) and result.is_truth):
            raise NotAProgram(f"decide gave a {type(result).__name__}, which is not a condition on its signals")
    shapes = {table.shape for table in notes.tables} or {(1, 1)}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise NotAProgram(f"its tables have the shapes {sorted(shapes)}")
    return PolicyProgram(
        instructions=np.array(notes.instructions, dtype=np.int64),
        constants=np.array(notes.constants, dtype=np.float64),
        tables=np.array(notes.tables, dtype=np.float64).reshape(-1, *shapes.pop()),
        full=full.index,
        reasons={reason: noted.index for reason, noted in reasons.items()},
    )


class _NotedSignals(StepSignals):
    """Signals of units of all layers, each of which has its own place in a table."""

    def per_unit(self, parameter: PerUnit) -> Any:
        return parameter if isinstance(parameter, (int, float)) else self.age.new_tensor(parameter)


class _AnyLayer:
    """The layer of units that may be of any: what depends on it is no program."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError("it asks for the layer")

    def __index__(self) -> int:
        raise TypeError("it asks for the layer")

    def __bool__(self) -> bool:
        raise TypeError("it asks for the layer")


class _Notes:
    """The instructions so far."""

    def __init__(self) -> None:
        self.instructions: list[tuple[int, int, int, int]] = []
        self.constants: list[float] = []
        self.tables: list[np.ndarray] = []
        self._known: dict[tuple[int, int, int, int], int] = {}

    def add(self, op: Op, *operands: int, is_truth: bool = False) -> _Noted:
        a, b, c = (*operands, 0, 0, 0)[:3]
        instruction = (int(op), a, b, c)
        if instruction not in self._known:
            self._known[instruction] = len(self.instructions)
            self.instructions.append(instruction)
        return _Noted(self, self._known[instruction], is_truth)

    def operand(self, value: Any) -> _Noted:
        if isinstance(value, _Noted):
            return value
        if isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
            self.constants.append(float(value))
            return self.add(Op.CONSTANT, len(self.constants) - 1, is_truth=isinstance(value, (bool, np.bool_)))
        raise TypeError(f"a {type(value).__name__} among signals")


class _Noted:
    """A number per unit that does not exist yet; what is done to it becomes an instruction."""

    # NumPy's own functions and scalars leave operators to this class, and refuse anything else.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, notes: _Notes, index: int, is_truth: bool) -> None:
        self._notes = notes
        self.index = index
        self.is_truth = is_truth

    def _with(self, op: Op, *others: Any, is_truth: bool = False, turned: bool = False) -> _Noted:
        operands = [self, *(self._notes.operand(other) for other in others)]
        if not is_truth and all(operand.is_truth for operand in operands):
            # NumPy adds conditions by "or" and subtracts them not at all: nothing that other libraries agree on.
            raise TypeError(f"{op.name.lower()} of conditions, not of numbers")
        indices = [operand.index for operand in (reversed(operands) if turned else operands)]
        return self._notes.add(op, *indices, is_truth=is_truth)

    def _truth(self, op: Op, *others: Any) -> _Noted:
        if not all(operand.is_truth for operand in (self, *map(self._notes.operand, others))):
            raise TypeError(f"{op.name.lower()} of numbers, not of conditions")
        return self._with(op, *others, is_truth=True)

    def __add__(self, other: Any) -> _Noted:
        return self._with(Op.ADD, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> _Noted:
        return self._with(Op.SUBTRACT, other)

    def __rsub__(self, other: Any) -> _Noted:
        return self._with(Op.SUBTRACT, other, turned=True)

    def __mul__(self, other: Any) -> _Noted:
        return self._with(Op.MULTIPLY, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> _Noted:
        return self._with(Op.DIVIDE, other)

    def __rtruediv__(self, other: Any) -> _Noted:
        return self._with(Op.DIVIDE, other, turned=True)

    def __floordiv__(self, other: Any) -> _Noted:
        return self._with(Op.FLOOR_DIVIDE, other)

    def __rfloordiv__(self, other: Any) -> _Noted:
        return self._with(Op.FLOOR_DIVIDE, other, turned=True)

    def __mod__(self, other: Any) -> _Noted:
        return self._with(Op.MODULO, other)

    def __rmod__(self, other: Any) -> _Noted:
        return self._with(Op.MODULO, other, turned=True)

    def __pow__(self, other: Any) -> _Noted:
        return self._with(Op.POWER, other)

    def __rpow__(self, other: Any) -> _Noted:
        return self._with(Op.POWER, other, turned=True)

    def __neg__(self) -> _Noted:
        return self._with(Op.NEGATIVE)

    def __abs__(self) -> _Noted:
        return self._with(Op.ABSOLUTE)

    def __lt__(self, other: Any) -> _Noted:
        return self._with(Op.LESS, other, is_truth=True)

    def __le__(self, other: Any) -> _Noted:
        return self._with(Op.LESS_EQUAL, other, is_truth=True)

    def __gt__(self, other: Any) -> _Noted:
        return self._with(Op.GREATER, other, is_truth=True)

    def __ge__(self, other: Any) -> _Noted:
        return self._with(Op.GREATER_EQUAL, other, is_truth=True)

    def __eq__(self, other: object) -> _Noted:  # type: ignore[override]
        return self._with(Op.EQUAL, other, is_truth=True)

    def __ne__(self, other: object) -> _Noted:  # type: ignore[override]
        return self._with(Op.NOT_EQUAL, other, is_truth=True)

    def __and__(self, other: Any) -> _Noted:
        return self._truth(Op.AND, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> _Noted:
        return self._truth(Op.OR, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> _Noted:
        return self._truth(Op.XOR, other)

    __rxor__ = __xor__

    def __invert__(self) -> _Noted:
        return self._truth(Op.NOT)

    def __bool__(self) -> bool:
        raise TypeError("it asks whether a condition holds, which differs from unit to unit")

    def where(self, condition: Any, other: Any) -> _Noted:
        """As of a torch tensor; `policies.arrays.where` calls it."""
        chosen = self._notes.operand(other)
        is_truth = self.is_truth and chosen.is_truth
        return self._notes.add(
            Op.WHERE, self._notes.operand(condition).index, self.index, chosen.index, is_truth=is_truth
        )

    def new_tensor(self, values: Any) -> _Noted:
        """As of a torch tensor; `policies.arrays.like` calls it."""
        self._notes.tables.append(np.asarray(values, dtype=np.float64))
        return self._notes.add(Op.TABLE, len(self._notes.tables) - 1)
