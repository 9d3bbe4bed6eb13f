"""What traces say on average: by age, by unit, by kind of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from traces.trace import BY_AGE, Trace

SIMILARITY_EDGES = np.linspace(-1.0, 1.0, 201)
MASS_EDGES = np.linspace(0.0, 1.0, 101)


def doubling_ages(max_age: int) -> list[int]:
    """The ages 1, 2, 4, … that are at most `max_age`, in steps; traces record all of them that they reach."""
    return [2**power for power in range(max_age.bit_length())]


@dataclass(frozen=True)
class Tally:
    """A sum that knows how many values it holds, element by element.

    Attributes:
        total: float64: sum of the values that are not NaN.
        count: int64, the same shape: how many they are.
    """

    total: np.ndarray
    count: np.ndarray

    @classmethod
    def over_steps(cls, values: np.ndarray) -> Tally:
        """Sum over the first axis; NaN, not recorded, is passed over."""
        recorded = ~np.isnan(values)
        total = np.sum(values, axis=0, dtype=np.float64, where=recorded)
        return cls(np.asarray(total), np.asarray(np.count_nonzero(recorded, axis=0)))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.count + other.count)

    def mean(self, axes: int | tuple[int, ...] = ()) -> np.ndarray:
        """Mean of the values, over `axes` too when given; NaN where there is none."""
        total, count = self.total.sum(axis=axes), self.count.sum(axis=axes)
        return np.asarray(np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0))

    def spread(self, n_rows: int, rows: Sequence[int]) -> Tally:
        """The same among `n_rows` rows, of which those that are not among `rows` hold no value."""
        total, count = (np.zeros((n_rows, *values.shape[1:]), values.dtype) for values in (self.total, self.count))
        total[rows], count[rows] = self.total, self.count
        return Tally(total, count)


@dataclass(frozen=True)
class Summary:
    """Sums over one or several traces, from which every mean follows; `a + b` summarises the traces of both.

    Its size depends on ages and units and not on steps, so traces can be summarised one at a time. A mean gives every
    recorded (step, unit) the same weight, and is NaN where nothing was recorded. The mean at age a is over the steps
    that have such an age, from step a - 1 on.

    Attributes:
        n_traces: Traces.
        n_steps: Decode steps of all of them.
        n_prompt_tokens: Prompt tokens of all of them.
        ages: Ages that any of them records, rising from 1.
        recovered_mass: Tally `(ages, layers, kv_heads)`.
        query_similarity: The same.
        overlap: The same.
        fresh_mass: Tally `(layers, kv_heads)`: recovered mass at age 0, the last token of the prompt included.
        token_log_prob: Tally `()`: natural log-probability of the tokens that followed.
        mass_by_similarity: Tally `(200,)`: recovered mass at all ages, by the bins `SIMILARITY_EDGES` of query
            similarity.
        joint: int64 `(200, 100)`: how many (step, age, unit) fall in each bin of `SIMILARITY_EDGES` and `MASS_EDGES`.
    """

    n_traces: int
    n_steps: int
    n_prompt_tokens: int
    ages: tuple[int, ...]
    recovered_mass: Tally
    query_similarity: Tally
    overlap: Tally
    fresh_mass: Tally
    token_log_prob: Tally
    mass_by_similarity: Tally
    joint: np.ndarray

    @classmethod
    def of(cls, trace: Trace) -> Summary:
        """Summarise one trace."""
        # What else an entry may be: the prompt's set, which is younger.
        of_age = np.array(trace.header.ages) <= np.arange(trace.header.n_steps)[:, None] + 1
        by_age = {name: np.where(of_age[..., None, None], getattr(trace, name), np.nan) for name in BY_AGE}
        mass_by_similarity, joint = _mass_by_similarity(by_age["query_similarity"], by_age["recovered_mass"])
        return cls(
            n_traces=1,
            n_steps=trace.header.n_steps,
            n_prompt_tokens=int(trace.header.prompt["n_prompt_tokens"]),
            ages=tuple(trace.header.ages),
            fresh_mass=Tally.over_steps(trace.fresh_mass),
            token_log_prob=Tally.over_steps(trace.token_log_prob),
            mass_by_similarity=mass_by_similarity,
            joint=joint,
            **{name: Tally.over_steps(values) for name, values in by_age.items()},
        )

    def __add__(self, other: Summary) -> Summary:
        if self.units != other.units:
            raise ValueError(f"traces of other (layers, KV heads) do not add up: {self.units} and {other.units}.")
        ages = tuple(sorted({*self.ages, *other.ages}))
        mine, theirs = self._at(ages), other._at(ages)
        sums = {field.name: mine[field.name] + theirs[field.name] for field in fields(self) if field.name != "ages"}
        return Summary(ages=ages, **sums)

    @property
    def max_age(self) -> int:
        """Oldest age of any of the traces, in steps."""
        return self.ages[-1]

    @property
    def units(self) -> tuple[int, int]:
        """`(layers, kv_heads)`."""
        layers, kv_heads = self.fresh_mass.total.shape
        return layers, kv_heads

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood under full attention, in nats per token."""
        return -float(self.token_log_prob.mean())

    @property
    def mean_fresh_mass(self) -> float:
        """Mean recovered mass at age 0, in [0, 1]."""
        return float(self.fresh_mass.mean((0, 1)))

    def by_age(self, name: str) -> np.ndarray:
        """Mean `(ages,)` of one of the arrays by age: `recovered_mass`, `query_similarity` or `overlap`."""
        return self._tally(name).mean((1, 2))

    def by_unit(self, name: str) -> np.ndarray:
        """Mean `(ages, layers, kv_heads)` of one of the arrays by age."""
        return self._tally(name).mean()

    def _at(self, ages: Sequence[int]) -> dict[str, Any]:
        """All fields, arrays by age at `ages`, which hold its own."""
        rows = np.searchsorted(ages, self.ages).tolist()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {name: values[name].spread(len(ages), rows) for name in BY_AGE}

    def _tally(self, name: str) -> Tally:
        if name not in BY_AGE:
            raise ValueError(f"{name!r} is not recorded by age: take one of {', '.join(BY_AGE)}.")
        tally: Tally = getattr(self, name)
        return tally


def summarise(traces: Iterable[Trace]) -> tuple[Summary, Mapping[str, Summary]]:
    """Summarise traces of one model, holding one at a time.

    Returns:
        The summary of all of them, and that of each kind of text, sorted by kind.

    Raises:
        ValueError: If there are no traces, or if they differ in layers or KV heads.
    """
    by_kind: dict[str, Summary] = {}
    for trace in traces:
        one = Summary.of(trace)
        by_kind[trace.kind] = by_kind[trace.kind] + one if trace.kind in by_kind else one
        # Else this one stays in memory while the next is read.
        del trace
    if not by_kind:
        raise ValueError("there are no traces to summarise.")
    first, *rest = by_kind.values()
    return sum(rest, start=first), dict(sorted(by_kind.items()))


def quantiles_over_units(by_unit: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles over units of an array `(n, layers, kv_heads)`: `(quantiles, n)`, NaN where all units are NaN."""
    flat = by_unit.reshape(len(by_unit), -1)
    recorded = ~np.isnan(flat).all(axis=1)
    result = np.full((len(quantiles), len(flat)), np.nan)
    result[:, recorded] = np.nanquantile(flat[recorded], quantiles, axis=1)
    return result


def quantiles_by_similarity(summary: Summary, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of recovered mass within each bin of query similarity: `(quantiles, 200)`, NaN in empty bins.

    They are read off `joint`, as if values were evenly spread within a bin of mass, which is 0.01 wide.
    """
    result = np.full((len(quantiles), len(summary.joint)), np.nan)
    for row in np.flatnonzero(summary.joint.sum(axis=1)):
        below = np.concatenate([[0], np.cumsum(summary.joint[row])])
        result[:, row] = np.interp(np.multiply(quantiles, below[-1]), below, MASS_EDGES)
    return result


def _mass_by_similarity(similarity: np.ndarray, mass: np.ndarray) -> tuple[Tally, np.ndarray]:
    rows, columns = len(SIMILARITY_EDGES) - 1, len(MASS_EDGES) - 1
    total, joint = np.zeros(rows), np.zeros(rows * columns, dtype=np.int64)
    # Step by step: the bin numbers of a whole trace would take twice the room of its arrays.
    for similar, kept in zip(similarity, mass, strict=True):
        recorded = ~(np.isnan(similar) | np.isnan(kept))
        similar, kept = similar[recorded], kept[recorded]
        row = _bin(similar, SIMILARITY_EDGES)
        total += np.bincount(row, weights=kept, minlength=rows)
        joint += np.bincount(row * columns + _bin(kept, MASS_EDGES), minlength=rows * columns)
    table = joint.reshape(rows, columns)
    return Tally(total, table.sum(axis=1)), table


def _bin(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    # The edges are evenly spaced. A cosine may round to a little more than 1: it belongs in the last bin.
    n_bins = len(edges) - 1
    place = (values.astype(np.float64) - edges[0]) * (n_bins / (edges[-1] - edges[0]))
    return np.asarray(np.clip(place.astype(np.int64), 0, n_bins - 1))
