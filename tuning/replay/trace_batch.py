"""Traces side by side, laid out for replay."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property

import numpy as np

from traces import Trace, TraceFile

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
            if mine != theirs:
                raise ValueError(
                    "traces that are replayed together need the same steps, ages and units: "
                    f"{header.prompt['name']} has {mine}, {first.prompt['name']} has {theirs}."
                )
        self.n_steps = first.n_steps
        self.max_age = first.max_age
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
        return np.stack([_lost_by_age(trace.recovered_mass) for trace in self.traces])

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

    def numbers(self, name: str, trace: np.ndarray, *index: np.ndarray) -> np.ndarray:
        """Single numbers of an array by age: float64 `(n,)`.

        Args:
            name: Of the array.
            trace: int `(n,)`: which traces to look at.
            index: Where, for each axis of the array: int `(n,)`.
        """
        found = np.empty(len(trace))
        for i in range(len(self)):
            mine = trace == i
            found[mine] = getattr(self.traces[i], name)[tuple(axis[mine] for axis in index)]
        return found


def _lost_by_age(recovered_mass: np.ndarray) -> np.ndarray:
    lost = 1 - recovered_mass.astype(np.float64)
    seen = ~np.isnan(lost)
    count = seen.sum(0)
    total = np.where(seen, lost, 0).sum(0)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
