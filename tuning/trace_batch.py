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
    """Some traces of one model, one selection and one length, read as far as they are used.

    Args:
        files: Traces, on disk or in memory.

    Raises:
        ValueError: If there are none, or they differ in steps, ages or model shape.
    """

    def __init__(self, files: Sequence[TraceFile | Trace]) -> None:
        if not files:
            raise ValueError("there are no traces to replay.")
        self.files = tuple(files)
        headers = [file.header for file in files]
        self.headers = tuple(headers)
        first = headers[0]
        for header in headers:
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
        self._of_trace: dict[tuple[str, int], np.ndarray] = {}
        self.kinds = tuple(str(header.prompt["kind"]) for header in headers)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(traces, layers, kv_heads)`."""
        return (len(self), *self.units)

    @cached_property
    def recovered_mass(self) -> np.ndarray:
        """float32 `(steps, max_age, traces, layers, kv_heads)`."""
        return self._stacked("recovered_mass")

    @cached_property
    def query_similarity(self) -> np.ndarray:
        """float32 `(steps, max_age, traces, layers, kv_heads)`."""
        return self._stacked("query_similarity")

    @cached_property
    def overlap(self) -> np.ndarray:
        """float32 `(steps, max_age, traces, layers, kv_heads)`."""
        return self._stacked("overlap")

    @cached_property
    def fresh_mass(self) -> np.ndarray:
        """float32 `(steps + 1, traces, layers, kv_heads)`."""
        return self._stacked("fresh_mass")

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """float64 `(steps, traces, 1, 1)`: ids of the tokens that were fed."""
        tokens = [file.array("tokens") if isinstance(file, TraceFile) else file.tokens for file in self.files]
        fed = [each[-self.n_steps :] for each in tokens]
        return np.stack(fed, axis=1).astype(np.float64)[:, :, None, None]

    @cached_property
    def lost_by_age(self) -> np.ndarray:
        """float64 `(traces, max_age, layers, kv_heads)`: mean over steps of the mass that a set of that age misses.

        NaN where no step has a set of that age.
        """
        lost = 1 - self.recovered_mass.astype(np.float64)
        seen = ~np.isnan(lost)
        count = seen.sum(0)
        total = np.where(seen, lost, 0).sum(0)
        return np.moveaxis(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0), 0, 1)

    def of_trace(self, name: str, trace: int) -> np.ndarray:
        """An array of one trace with its units in a row: `(..., layers x kv_heads)`, memory-mapped if it is on disk."""
        known = self._of_trace.get((name, trace))
        if known is None:
            file = self.files[trace]
            array = file.mapped(name) if isinstance(file, TraceFile) else getattr(file, name)
            known = np.ascontiguousarray(array).reshape(*array.shape[:-2], -1)
            self._of_trace[name, trace] = known
        return known

    def _stacked(self, name: str) -> np.ndarray:
        arrays = [file.array(name) if isinstance(file, TraceFile) else getattr(file, name) for file in self.files]
        # Traces go before the units: what a step of replay reads lies together.
        return np.stack(arrays, axis=-3)
