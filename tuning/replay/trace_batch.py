"""Traces side by side, laid out for replay."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property

import numpy as np

from traces import Trace, TraceFile
from traces.ages import all_ages, at_age, last_recorded, mean_by_age, since_prompt

# Measured signals that follow from what traces record; `StepSignals.token` does as well.
TRACED_SIGNALS = frozenset({"query_similarity", "step_similarity", "refresh_mass", "refresh_overlap"})


def check_traced(needs: Set[str], who: str) -> None:
    """Refuse what reads measured signals that traces do not record.

    Args:
        needs: Names of the signals.
        who: Who reads them, for the message.

    Raises:
        ValueError: With the signal.
    """
    for name in sorted(needs - TRACED_SIGNALS):
        raise ValueError(f"{who} needs the signal {name!r}, which traces do not record: run it in closed loop instead.")


class TraceBatch:
    """Some traces of one model, one selection and one length, side by side.

    Traces on disk are memory-mapped when the batch is made, and read as far as they are used. A file that is written
    anew later (`traces.write_trace`) does not change the batch; what is mapped is let go with the batch.

    Args:
        files: Traces, on disk or in memory.

    Raises:
        ValueError: If there are none, or they differ in steps, ages or model shape, or a file is no whole trace.
    """

    def __init__(self, files: Sequence[TraceFile | Trace]) -> None:
        if not files:
            raise ValueError("there are no traces to replay.")
        self.traces = tuple(file.map() if isinstance(file, TraceFile) else file for file in files)
        self.headers = tuple(trace.header for trace in self.traces)
        first = self.headers[0]
        for header in self.headers:
            mine = header.n_steps, header.max_age, header.units
            theirs = first.n_steps, first.max_age, first.units
            if mine != theirs or header.ages != first.ages:
                raise ValueError(
                    "traces that are replayed together need the same steps, ages and units: "
                    f"{header.prompt['name']} has {mine}, {first.prompt['name']} has {theirs}."
                )
        self.n_steps = first.n_steps
        self.max_age = first.max_age
        self.ages = np.array(first.ages, dtype=np.int64)
        self.last_recorded = last_recorded(first.ages)
        self.units = first.units
        self.kinds = tuple(trace.kind for trace in self.traces)
        self._of_trace: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.traces)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(traces, layers, kv_heads)`."""
        return (len(self), *self.units)

    @cached_property
    def fresh_mass(self) -> np.ndarray:
        """float32 `(steps + 1, traces, layers, kv_heads)`."""
        return np.stack([trace.fresh_mass for trace in self.traces], axis=1)

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """float64 `(steps, traces, 1, 1)`: ids of the tokens that were fed."""
        fed = [trace.tokens[len(trace.tokens) - self.n_steps :] for trace in self.traces]
        return np.stack(fed, axis=1).astype(np.float64)[:, :, None, None]

    @cached_property
    def lost_by_age(self) -> np.ndarray:
        """float64 `(traces, max_age, layers, kv_heads)`: mean over steps of the mass that a set of that age misses.

        NaN where no step has a set of that age.
        """
        return np.stack([1 - mean_by_age(trace.recovered_mass, self.ages) for trace in self.traces])

    @cached_property
    def lost_since_prompt(self) -> np.ndarray:
        """float64 `(traces, steps, layers, kv_heads)`: mass that the prompt's set misses at each step."""
        return np.stack([1 - since_prompt(trace.recovered_mass, self.ages).astype(np.float64) for trace in self.traces])

    def of_trace(self, name: str, trace: int) -> np.ndarray:
        """An array of one trace with its units in a row: float32 `(..., layers x kv_heads)`, read-only."""
        known = self._of_trace.get((name, trace))
        if known is None:
            array = getattr(self.traces[trace], name)
            known = np.ascontiguousarray(array).reshape(*array.shape[:-2], -1).view()
            # A kernel is compiled once for arrays in memory and on disk if neither may be written to.
            known.flags.writeable = False
            self._of_trace[name, trace] = known
        return known

    def at_all_ages(self, name: str, trace: int) -> np.ndarray:
        """An array of one trace at every age: float64 `(steps, max_age, layers x kv_heads)`, NaN where no set is."""
        array = self.of_trace(name, trace)
        found = np.full((self.n_steps, self.max_age, array.shape[-1]), np.nan)
        for step in range(self.n_steps):
            n_recorded = min(int(np.searchsorted(self.ages, step + 1)) + 1, len(self.ages))
            ages = self.ages[:n_recorded].clip(max=step + 1)
            found[step, : ages[-1]] = all_ages(array[step, :n_recorded], ages)
        return found

    def at_age(self, name: str, trace: np.ndarray, step: np.ndarray, age: np.ndarray, *unit: np.ndarray) -> np.ndarray:
        """Single numbers of an array by age: float64 `(n,)`; see `traces.ages.at_age`.

        Args:
            name: Of the array.
            trace: int `(n,)`: which traces to look at.
            step: int `(n,)`.
            age: int `(n,)`, from 1 to step + 1.
            unit: int `(n,)`: layers, and KV heads.
        """
        found = np.empty(len(trace))
        for i in range(len(self)):
            mine = trace == i
            at = (step[mine], age[mine], *(axis[mine] for axis in unit))
            found[mine] = at_age(getattr(self.traces[i], name), self.ages, self.last_recorded, *at)
        return found
