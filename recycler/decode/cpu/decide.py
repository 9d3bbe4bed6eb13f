"""Running a policy's program for the units of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from policies import (
    QUERY_SIGNALS,
    SIGNALS,
    NotAProgram,
    PolicyProgram,
    Schedule,
    StepPolicy,
    StepSignals,
    policy_program,
)
from policies.compiled.operations import CONSTANT, SIGNAL, TABLE, result
from recycler.decode.cpu.arrays import Array, Signals
from recycler.decode.cpu.compiled import kernel
from recycler.decode.per_row import PerRow

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


class Decisions(ABC):
    """A policy's decisions at one step after the other.

    Attributes:
        full: bool `(layers, rows, kv_heads)`: decisions of the step so far. Layers come first, so that a kernel gets
            those of its layer in one piece.
    """

    full: Array

    @property
    @abstractmethod
    def reasons(self) -> Mapping[str, Array]:
        """What wrappers overruled at this step, bool `(layers, rows, kv_heads)`, by reason."""

    @abstractmethod
    def begin_step(self, schedule: Schedule, token: Array | None = None) -> None:
        """Get ready for a step.

        Args:
            schedule: Over `(rows, layers, kv_heads)`.
            token: `(rows, 1, 1)`, ids of the tokens that are fed; None if they are not known.
        """

    @abstractmethod
    def decide(self, layer: int, signals: Signals) -> None:
        """Decide for a layer, given what was measured there."""


def decisions(policy: StepPolicy, shape: tuple[int, int, int]) -> Decisions:
    """The fastest way to ask a policy; `shape` is `(layers, rows, kv_heads)`."""
    # Rows with policies of their own have programs of their own.
    each: tuple[StepPolicy, ...] = (policy,)
    if isinstance(policy, PerRow):
        policy.check_rows(shape[1])
        each = policy.rows
    try:
        programs = [policy_program(one) for one in each]
    except NotAProgram:
        return DecisionsByLayer(policy, shape)
    # Without a signal that the query of the step makes, it can decide for all layers beforehand.
    if policy.needs.isdisjoint(QUERY_SIGNALS):
        return DecisionsAhead(policy, shape)
    return DecisionsByProgram(programs, shape)


class DecisionsAhead(Decisions):
    """For programs that read nothing of the step's query: one call for all layers, before the first."""

    def __init__(self, policy: StepPolicy, shape: tuple[int, int, int]) -> None:
        self.full = np.zeros(shape, dtype=bool)
        self._policy = policy
        self._noted: dict[str, Array] = {}

    @property
    def reasons(self) -> Mapping[str, Array]:
        shape = np.moveaxis(self.full, 0, 1).shape
        return {reason: np.moveaxis(np.broadcast_to(noted, shape), 1, 0) for reason, noted in self._noted.items()}

    def begin_step(self, schedule: Schedule, token: Array | None = None) -> None:
        self._noted = {}
        full = self._policy.decide(schedule.signals(reasons=self._noted, token=token))
        np.moveaxis(self.full, 0, 1)[...] = full

    def decide(self, layer: int, signals: Signals) -> None:
        pass


class DecisionsByProgram(Decisions):
    """A kernel runs the policy's program: no Python between the queries and the attention.

    Args:
        programs: One for all rows, or one for each.
        shape: `(layers, rows, kv_heads)`.
    """

    def __init__(self, programs: Sequence[PolicyProgram], shape: tuple[int, int, int]) -> None:
        rows = shape[1]
        # Reasons of rows with programs of their own have no common names.
        self._names = tuple(programs[0].reasons) if len(programs) == 1 else ()
        n_results = 1 + max(len(program.reasons) for program in programs)
        self._results = np.zeros((n_results, *shape), dtype=bool)
        self._programs: list[tuple[Program, int, int]] = [
            (as_program(program), row, row + 1 if len(programs) > 1 else rows) for row, program in enumerate(programs)
        ]
        self.full = self._results[0]
        self._state = np.zeros(0)

    @property
    def reasons(self) -> Mapping[str, Array]:
        return dict(zip(self._names, self._results[1:], strict=False))

    def begin_step(self, schedule: Schedule, token: Array | None = None) -> None:
        signals = schedule.signals(token=token)
        self._state = np.stack([getattr(signals, name) for name in SCHEDULE_SIGNALS])

    def decide(self, layer: int, signals: Signals) -> None:
        for program, first_row, last_row in self._programs:
            run_program(program, layer, first_row, last_row, self._state, signals, self._results)


class DecisionsByLayer(Decisions):
    """For policies of any make: one call per layer, on NumPy."""

    def __init__(self, policy: StepPolicy, shape: tuple[int, int, int]) -> None:
        self.full = np.zeros(shape, dtype=bool)
        self._policy = policy
        self._reasons: dict[str, Array] = {}

    @property
    def reasons(self) -> Mapping[str, Array]:
        return self._reasons

    def begin_step(self, schedule: Schedule, token: Array | None = None) -> None:
        self._schedule = schedule
        self._token = schedule.signals(token=token).token
        self._reasons = {}

    def decide(self, layer: int, signals: Signals) -> None:
        schedule = self._schedule
        noted: dict[str, Array] = {}
        self.full[layer] = self._policy.decide(
            StepSignals(
                step=schedule.step[:, layer],
                age=schedule.age[:, layer],
                n_full=schedule.n_full[:, layer],
                query_similarity=signals.query_similarity,
                step_similarity=signals.step_similarity,
                layer_similarity=signals.layer_similarity,
                refresh_mass=schedule.refresh_mass[:, layer],
                refresh_overlap=schedule.refresh_overlap[:, layer],
                token=self._token[:, layer],
                layer=layer,
                reasons=noted,
                tables=schedule.tables,
            )
        )
        for reason, units in noted.items():
            self._reasons.setdefault(reason, np.zeros_like(self.full))[layer] = units
