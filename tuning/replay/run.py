"""Replay: any schedule on recorded traces, with no model."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np

from policies import NotAProgram, PolicyProgram, Schedule, StepPolicy, policy_program
from traces import Trace
from tuning.replay.kernel import replay_trace
from tuning.replay.trace_batch import TraceBatch, check_traced

# Unit-steps that take about as long as starting a thread.
_UNIT_STEPS_PER_THREAD = 100_000


@dataclass(frozen=True)
class Replay:
    """What a policy would have done along the recorded path.

    Attributes:
        full: bool `(steps, traces, layers, kv_heads)`: decisions.
        lost_mass: float32 of the same shape, in [0, 1]: attention that the unit's set missed; 0 where it ran full, and
            what the new set misses at a keys-only refresh.
        beyond_max_age: Share of recycled unit-steps with a set older than the traces record. There the oldest
            recorded age stands in, and replay is an estimate.
        full_cost: What a full step of a unit counts, a number or `(layers, kv_heads)`: 1, or 1/2 for units that refresh
            by keys alone.
    """

    full: np.ndarray
    lost_mass: np.ndarray
    beyond_max_age: float
    full_cost: float | np.ndarray = 1.0

    @property
    def full_share(self) -> float:
        """Share of unit-steps that ran full; a keys-only refresh counts half."""
        return float(self.unit_full_share.mean())

    @property
    def unit_full_share(self) -> np.ndarray:
        """Full share `(layers, kv_heads)`."""
        share: np.ndarray = self.full.mean((0, 1)) * self.full_cost
        return share

    @property
    def recovered_mass(self) -> float:
        """Mean recovered mass over unit-steps; 1 where a unit ran full."""
        return 1 - float(self.lost_mass.mean(dtype=np.float64))


def replay_policy(traces: Trace | TraceBatch, policy: StepPolicy) -> Replay:
    """Run a policy on traces as the decoder would, for all units of all traces at once.

    Decisions equal the decoder's wherever it sees the same signals, that is as long as recycled steps have not moved
    its path away from the recorded one, no policy reads a similarity or an overlap at an age between two recorded ones
    (`traces.ages`: interpolated), and no set grows older than the traces' `max_age`.

    The replay takes 5 bytes per unit-step of all traces; of traces on disk only what is needed comes into memory.

    Args:
        traces: One trace or several.
        policy: Whom to replay.

    Raises:
        ValueError: If the policy has the parameters of another model shape, or needs a signal that traces do not
            record.
    """
    batch = _checked(traces, policy)
    try:
        replay = _replay_program(batch, policy_program(policy), policy.needs)
    except NotAProgram:
        replay = _replay_by_steps(batch, policy)
    keys_only = np.broadcast_to(np.asarray(policy.keys_only) != 0, batch.units)
    if not keys_only.any():
        return replay
    missed_by_new_set = 1 - batch.fresh_mass[1:]
    lost = np.where(replay.full & keys_only, missed_by_new_set, replay.lost_mass)
    return dataclasses.replace(replay, lost_mass=lost, full_cost=1 - keys_only / 2)


def replay_full_share(traces: Trace | TraceBatch, policy: StepPolicy) -> np.ndarray:
    """How often each unit would have run full, without looking at what the others lost.

    Args:
        traces: One trace or several.
        policy: Whom to replay.

    Returns:
        `Replay.unit_full_share` of `replay_policy`.

    Raises:
        ValueError: As `replay_policy` does.
    """
    batch = _checked(traces, policy)
    try:
        program = policy_program(policy)
    except NotAProgram:
        return replay_policy(batch, policy).unit_full_share
    full, _, _ = _run_program(batch, program, policy.needs, wants_lost_mass=False)
    share: np.ndarray = full.mean((0, 1)).reshape(batch.units) * np.asarray(policy.full_cost)
    return share


def _checked(traces: Trace | TraceBatch, policy: StepPolicy) -> TraceBatch:
    batch = traces if isinstance(traces, TraceBatch) else TraceBatch([traces])
    for shape in policy.unit_shapes() - {batch.units}:
        # Else a single row of parameters would silently serve all layers.
        raise ValueError(f"the policy is for {shape} layers and KV heads, but the traces have {batch.units}.")
    check_traced(policy.needs, f"the policy {policy.kind!r}")
    return batch


def _share_beyond(n_beyond: int, full: np.ndarray) -> float:
    return n_beyond / max(full.size - int(full.sum()), 1)


def _replay_program(batch: TraceBatch, program: PolicyProgram, needs: frozenset[str]) -> Replay:
    full, lost, n_beyond = _run_program(batch, program, needs, wants_lost_mass=True)
    by_unit = (len(batch), batch.n_steps, *batch.units)
    steps_first = full.reshape(by_unit).swapaxes(0, 1), lost.reshape(by_unit).swapaxes(0, 1)
    return Replay(*steps_first, beyond_max_age=_share_beyond(n_beyond, full))


def _run_program(
    batch: TraceBatch, program: PolicyProgram, needs: frozenset[str], *, wants_lost_mass: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Trace by trace in compiled code, on all processors.

    Returns:
        bool `(traces, steps, units)`: decisions; float32 of the same shape or empty: lost mass; and recycled unit-steps
        beyond the oldest age.
    """
    n_units = math.prod(batch.units)
    tables = np.array(np.broadcast_to(program.tables, (len(program.tables), *batch.units))).reshape(-1, n_units)
    full = np.empty((len(batch), batch.n_steps, n_units), dtype=bool)
    lost = np.empty((len(batch), batch.n_steps if wants_lost_mass else 0, n_units), dtype=np.float32)

    def array(name: str, trace: int, wanted: bool) -> np.ndarray:
        # Of what is not wanted, an array of the same kind without steps.
        return batch.of_trace(name, trace)[: None if wanted else 0]

    def replay(trace: int) -> int:
        return int(
            replay_trace(
                program.instructions,
                program.constants,
                tables,
                program.full,
                batch.ages,
                batch.last_recorded,
                array("recovered_mass", trace, wants_lost_mass),
                array("query_similarity", trace, bool(needs & {"query_similarity", "step_similarity"})),
                "query_similarity" in needs,
                "step_similarity" in needs,
                array("overlap", trace, "refresh_overlap" in needs),
                array("fresh_mass", trace, "refresh_mass" in needs),
                batch.step_tokens[:, trace, 0, 0].copy(),
                full[trace],
                lost[trace],
            )
        )

    n_threads = min(len(batch), numba.config.NUMBA_NUM_THREADS, 1 + full.size // _UNIT_STEPS_PER_THREAD)
    if n_threads == 1:
        return full, lost, sum(map(replay, range(len(batch))))
    with ThreadPoolExecutor(n_threads) as threads:
        return full, lost, sum(threads.map(replay, range(len(batch))))


def _replay_by_steps(batch: TraceBatch, policy: StepPolicy) -> Replay:
    """All traces a step at a time, for a policy that only Python can run."""
    needs = policy.needs
    fresh = batch.fresh_mass.astype(np.float64) if "refresh_mass" in needs else None
    schedule = Schedule(np.zeros(batch.shape), None if fresh is None else fresh[0])
    full = np.empty((batch.n_steps, *batch.shape), dtype=bool)
    lost = np.empty((batch.n_steps, *batch.shape), dtype=np.float32)
    first, n_beyond = np.ones(batch.shape), 0
    for step in range(batch.n_steps):
        age = schedule.age
        full[step] = policy.decide(
            schedule.signals(
                query_similarity=_at(batch, "query_similarity", step, age) if "query_similarity" in needs else None,
                step_similarity=_at(batch, "query_similarity", step, first) if "step_similarity" in needs else None,
                token=batch.step_tokens[step],
            )
        )
        lost[step] = np.where(full[step], 0, 1 - _at(batch, "recovered_mass", step, age))
        n_beyond += int((~full[step] & (age > batch.max_age)).sum())
        schedule.advance(
            full[step],
            refresh_mass=None if fresh is None else fresh[step + 1],
            refresh_overlap=_at(batch, "overlap", step, age) if "refresh_overlap" in needs else None,
        )
    return Replay(full, lost, _share_beyond(n_beyond, full))


def _at(batch: TraceBatch, name: str, step: int, age: np.ndarray) -> np.ndarray:
    """An array by age at one step, each unit at its own age: float64 `(traces, layers, kv_heads)`."""
    trace, layer, head = (axis.ravel() for axis in np.indices(age.shape))
    found = batch.at_age(name, trace, np.full(age.size, step), age.astype(np.intp).ravel(), layer, head)
    return found.reshape(age.shape)
