"""Replay: any schedule on recorded traces, with no model."""

from __future__ import annotations

import dataclasses
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from policies import NotAProgram, PolicyProgram, Schedule, StepPolicy, policy_program
from traces import Trace
from tuning.replay_kernel import replay_trace
from tuning.trace_batch import TraceBatch, check_traced


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
    its path away from the recorded one, and no set grows older than the traces' `max_age`.

    Args:
        traces: One trace or several.
        policy: Whom to replay.

    Raises:
        ValueError: If the policy has the parameters of another model shape, or needs a signal that traces do not
            record.
    """
    batch = traces if isinstance(traces, TraceBatch) else TraceBatch([traces])
    for shape in policy.unit_shapes() - {batch.units}:
        # Else a single row of parameters would silently serve all layers.
        raise ValueError(f"the policy is for {shape} layers and KV heads, but the traces have {batch.units}.")
    needs = policy.needs
    check_traced(needs, f"the policy {policy.kind!r}")
    try:
        replay = _replay_program(batch, policy_program(policy), needs)
    except NotAProgram:
        replay = _replay_by_steps(batch, policy, needs)
    keys_only = np.broadcast_to(np.asarray(policy.keys_only) != 0, batch.units)
    if not keys_only.any():
        return replay
    missed_by_new_set = 1 - batch.fresh_mass[1:]
    lost = np.where(replay.full & keys_only, missed_by_new_set, replay.lost_mass)
    return dataclasses.replace(replay, lost_mass=lost, full_cost=1 - keys_only / 2)


def _replay_program(batch: TraceBatch, program: PolicyProgram, needs: frozenset[str]) -> Replay:
    """Trace by trace in compiled code, on all processors; only what is touched of a trace is read."""
    n_units = math.prod(batch.units)
    tables = np.ascontiguousarray(np.broadcast_to(program.tables, (len(program.tables), *batch.units)))
    full = np.empty((len(batch), batch.n_steps, n_units), dtype=bool)
    lost = np.empty(full.shape, dtype=np.float32)
    by_age, by_step = np.empty((0, 0, 0), dtype=np.float32), np.empty((0, 0), dtype=np.float32)
    similarities = {"query_similarity", "step_similarity"}

    def replay(trace: int) -> int:
        return int(
            replay_trace(
                program.instructions,
                program.constants,
                tables.reshape(len(tables), n_units),
                program.full,
                batch.of_trace("recovered_mass", trace),
                batch.of_trace("query_similarity", trace) if needs & similarities else by_age,
                "query_similarity" in needs,
                "step_similarity" in needs,
                batch.of_trace("overlap", trace) if "refresh_overlap" in needs else by_age,
                batch.of_trace("fresh_mass", trace) if "refresh_mass" in needs else by_step,
                batch.step_tokens[:, trace, 0, 0].copy(),
                full[trace],
                lost[trace],
            )
        )

    with ThreadPoolExecutor(min(len(batch), os.cpu_count() or 1)) as threads:
        n_beyond = sum(threads.map(replay, range(len(batch))))
    by_unit = (len(batch), batch.n_steps, *batch.units)
    n_recycled = max(int((~full).sum()), 1)
    steps_first = full.reshape(by_unit).swapaxes(0, 1), lost.reshape(by_unit).swapaxes(0, 1)
    return Replay(*steps_first, beyond_max_age=n_beyond / n_recycled)


def _replay_by_steps(batch: TraceBatch, policy: StepPolicy, needs: frozenset[str]) -> Replay:
    """All traces a step at a time, for a policy that only Python can run."""
    wants_mass, wants_overlap = "refresh_mass" in needs, "refresh_overlap" in needs
    fresh = batch.fresh_mass.astype(np.float64) if wants_mass else None
    schedule = Schedule(np.zeros(batch.shape), None if fresh is None else fresh[0])
    full = np.empty((batch.n_steps, *batch.shape), dtype=bool)
    lost = np.empty((batch.n_steps, *batch.shape), dtype=np.float32)
    n_beyond = 0
    for step in range(batch.n_steps):
        at = _At(step, schedule.age, batch.max_age)
        full[step] = policy.decide(
            schedule.signals(
                query_similarity=at.age(batch.query_similarity) if "query_similarity" in needs else None,
                step_similarity=at.last_step(batch.query_similarity) if "step_similarity" in needs else None,
                token=batch.step_tokens[step],
            )
        )
        lost[step] = np.where(full[step], 0, 1 - at.age(batch.recovered_mass))
        n_beyond += int((~full[step] & (schedule.age > batch.max_age)).sum())
        schedule.advance(
            full[step],
            refresh_mass=None if fresh is None else fresh[step + 1],
            refresh_overlap=at.age(batch.overlap) if wants_overlap else None,
        )
    return Replay(full, lost, n_beyond / max(int((~full).sum()), 1))


class _At:
    """Reads arrays by age at one step, each unit at its own age."""

    def __init__(self, step: int, age: np.ndarray, max_age: int) -> None:
        self._step = step
        self._units = np.arange(age.size)
        self._index = np.minimum(age, max_age).astype(np.intp).ravel() - 1
        self._shape = age.shape

    def age(self, by_age: np.ndarray) -> np.ndarray:
        slab = by_age[self._step].reshape(by_age.shape[1], -1)
        values: np.ndarray = slab[self._index, self._units].reshape(self._shape).astype(np.float64)
        return values

    def last_step(self, by_age: np.ndarray) -> np.ndarray:
        values: np.ndarray = by_age[self._step, 0].astype(np.float64)
        return values
