"""Who asks the policy at a step: a kernel that runs its program, or NumPy, in the middle of every layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from policies import SIGNALS, NotAProgram, PolicyProgram, Schedule, StepPolicy, policy_program
from policies.compiled.operations import prepare, run
from recycler.decode.cpu.arrays import Array
from recycler.decode.cpu.compiled import kernel
from recycler.decode.host_decisions import HostDecisions
from recycler.decode.per_row import PerRow

# Signals that are known before the step.
_OF_SCHEDULE = ("step", "age", "n_full", "refresh_mass", "refresh_overlap", "token")


class Decisions(ABC):
    """A policy's decisions at one step after the other.

    Args:
        shape: `(layers, rows, kv_heads)`.

    Attributes:
        full: bool `(layers, rows, kv_heads)`: decisions of the step so far. Layers come first, so that a kernel gets
            those of its layer in one piece.
        signals: float64 `(layers, rows, signals, kv_heads)`: what the policy sees; a layer's kernels write to it what
            they measure.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        layers, rows, kv_heads = shape
        self.full = np.zeros(shape, dtype=bool)
        self.signals = np.full((layers, rows, len(SIGNALS), kv_heads), np.nan)

    @property
    @abstractmethod
    def reasons(self) -> Mapping[str, Array]:
        """What wrappers overruled at this step, bool `(layers, rows, kv_heads)`, by reason."""

    def begin_step(self, schedule: Schedule, token: Array) -> None:
        """Get ready for a step.

        Args:
            schedule: Over `(rows, layers, kv_heads)`.
            token: `(rows, 1, 1)`, ids of the tokens that are fed.
        """
        known = schedule.signals(token=token)
        for name in _OF_SCHEDULE:
            self.signals[:, :, SIGNALS.index(name)] = getattr(known, name).swapaxes(0, 1)

    @abstractmethod
    def decide(self, layer: int) -> None:
        """Decide for a layer, when its signals are there."""


def decisions(policy: StepPolicy, shape: tuple[int, int, int]) -> Decisions:
    """The fastest way to ask a policy; `shape` is `(layers, rows, kv_heads)`."""
    # Rows with policies of their own have programs of their own.
    each = policy.rows if isinstance(policy, PerRow) else (policy,)
    try:
        return ProgramDecisions([policy_program(one) for one in each], shape)
    except NotAProgram:
        return NumpyDecisions(policy, shape)


class ProgramDecisions(Decisions):
    """A kernel runs the policy's program: no Python between the queries and the attention.

    Args:
        programs: One for all rows, or one for each.
        shape: `(layers, rows, kv_heads)`.
    """

    def __init__(self, programs: Sequence[PolicyProgram], shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        layers, rows, kv_heads = shape
        # Reasons of rows with programs of their own have no common names.
        self._names = tuple(programs[0].reasons) if len(programs) == 1 else ()
        self._overruled = np.zeros((layers, rows, len(self._names), kv_heads), dtype=bool)
        # Of each layer, the arguments of the kernel for each program.
        self._calls: list[list[tuple[Array, ...]]] = [[] for _ in range(layers)]
        for first, program in enumerate(programs):
            some = slice(first, rows if len(programs) == 1 else first + 1)
            reasons = np.array([program.reasons[name] for name in self._names], dtype=np.int64)
            registers = _registers(program, (layers, some.stop - some.start, kv_heads))
            for layer, calls in enumerate(self._calls):
                of_layer = (self.signals[layer, some], self.full[layer, some], self._overruled[layer, some])
                calls.append((program.instructions, np.array(program.full), reasons, registers[layer], *of_layer))

    @property
    def reasons(self) -> Mapping[str, Array]:
        return {name: self._overruled[:, :, i] for i, name in enumerate(self._names)}

    def decide(self, layer: int) -> None:
        for call in self._calls[layer]:
            run_program(*call)


def _registers(program: PolicyProgram, shape: tuple[int, int, int]) -> Array:
    """Registers `(layers, rows, instructions, kv_heads)` with what is the same at every step in them."""
    layers, rows, kv_heads = shape
    tables = np.broadcast_to(program.tables, (len(program.tables), layers, kv_heads))
    registers = np.zeros((layers, rows, len(program.instructions), kv_heads))
    for layer in range(layers):
        of_layer = np.ascontiguousarray(tables[:, layer])
        for row in range(rows):
            prepare(program.instructions, program.constants, of_layer, registers[layer, row])
    return registers


@kernel()
def run_program(
    instructions: Array,
    decision: Array,
    reasons: Array,
    registers: Array,
    signals: Array,
    full: Array,
    overruled: Array,
) -> None:
    """Decide for the units of some rows of a layer.

    Args:
        instructions: As in `PolicyProgram`.
        decision: int64 `()`: the instruction that decides.
        reasons: int64 `(reasons,)`: those whose results are the reasons.
        registers: float64 `(rows, instructions, kv_heads)`, prepared: gets results.
        signals: float64 `(rows, signals, kv_heads)`.
        full: bool `(rows, kv_heads)`: gets the decisions.
        overruled: bool `(rows, reasons, kv_heads)`: gets the reasons.
    """
    for row in range(full.shape[0]):
        run(instructions, signals[row], registers[row])
        for head in range(full.shape[1]):
            full[row, head] = registers[row, decision[()], head] != 0
            for i in range(reasons.shape[0]):
                overruled[row, i, head] = registers[row, reasons[i], head] != 0


class NumpyDecisions(Decisions):
    """For policies of any make: one call per layer."""

    def __init__(self, policy: StepPolicy, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self._host = HostDecisions(policy)
        self._reasons: dict[str, Array] = {}

    @property
    def reasons(self) -> Mapping[str, Array]:
        return self._reasons

    def begin_step(self, schedule: Schedule, token: Array) -> None:
        super().begin_step(schedule, token)
        self._reasons = {}

    def decide(self, layer: int) -> None:
        self.full[layer], noted = self._host.decide(layer, self.signals[layer].swapaxes(0, 1))
        for reason, units in noted.items():
            self._reasons.setdefault(reason, np.zeros_like(self.full))[layer] = units
