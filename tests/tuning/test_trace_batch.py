from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from traces import Trace, TraceFile, write_trace
from tuning import TraceBatch

MakeTrace = Callable[..., Trace]


def test_traces_lie_side_by_side_before_the_units(make_trace: MakeTrace) -> None:
    traces = [make_trace(name, n_steps=5, max_age=3, units=(2, 3), seed=seed) for seed, name in enumerate("abcd")]
    batch = TraceBatch(traces)
    assert (len(batch), batch.shape, batch.n_steps, batch.max_age, batch.units) == (4, (4, 2, 3), 5, 3, (2, 3))
    for name in ("recovered_mass", "query_similarity", "overlap"):
        stacked = getattr(batch, name)
        assert stacked.shape == (5, 3, 4, 2, 3)
        assert stacked.dtype == np.float32
        for i, trace in enumerate(traces):
            np.testing.assert_array_equal(stacked[:, :, i], getattr(trace, name))
    assert batch.fresh_mass.shape == (6, 4, 2, 3)
    for i, trace in enumerate(traces):
        np.testing.assert_array_equal(batch.fresh_mass[:, i], trace.fresh_mass)


def test_kinds_and_headers_follow_the_order_of_the_files(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace("b", "code"), make_trace("a", "prose"), make_trace("c", "code")])
    assert batch.kinds == ("code", "prose", "code")
    assert [header.prompt["name"] for header in batch.headers] == ["b", "a", "c"]


def test_a_trace_on_disk_and_one_in_memory_are_the_same(make_trace: MakeTrace, tmp_path: Path) -> None:
    traces = [make_trace(name, seed=seed) for seed, name in enumerate("ab")]
    files = [write_trace(trace, tmp_path) for trace in traces]
    in_memory, on_disk, mixed = TraceBatch(traces), TraceBatch(files), TraceBatch([traces[0], files[1]])
    for name in ("recovered_mass", "query_similarity", "overlap", "fresh_mass", "lost_by_age"):
        np.testing.assert_array_equal(getattr(on_disk, name), getattr(in_memory, name))
        np.testing.assert_array_equal(getattr(mixed, name), getattr(in_memory, name))


def test_an_array_is_read_when_it_is_used_and_once(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_trace(make_trace(name), tmp_path) for name in "ab"]
    read: list[tuple[str, str]] = []
    stock = TraceFile.array

    def array(self: TraceFile, name: str) -> np.ndarray:
        read.append((self.path.stem, name))
        return stock(self, name)

    monkeypatch.setattr(TraceFile, "array", array)
    batch = TraceBatch(files)
    assert read == []
    for _ in range(2):
        _ = batch.query_similarity
    assert read == [("a", "query_similarity"), ("b", "query_similarity")]


def test_no_traces_are_refused() -> None:
    with pytest.raises(ValueError, match="no traces to replay"):
        TraceBatch([])


@pytest.mark.parametrize("changed", [{"n_steps": 7}, {"max_age": 3}, {"units": (3, 2)}])
def test_traces_of_different_sizes_are_refused_with_both_names(
    make_trace: MakeTrace, changed: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"odd has .*, one has "):
        TraceBatch([make_trace("one"), make_trace("two"), make_trace("odd", **changed)])


def test_lost_mass_by_age_is_the_mean_over_the_steps_with_a_set_of_that_age(make_trace: MakeTrace) -> None:
    # Ages 1, 2 and 3 exist at the last 3, 2 and 1 of 3 steps; age 4 at none.
    mass = np.array([[0.5, 9, 9, 9], [0.25, 0.75, 9, 9], [1.0, 0.25, 0.125, 9]])
    lost = TraceBatch([make_trace(n_steps=3, units=(1, 1), recovered_mass=mass[:, :, None, None])]).lost_by_age
    assert lost.shape == (1, 4, 1, 1)
    np.testing.assert_allclose(lost[0, :3, 0, 0], [(0.5 + 0.75 + 0) / 3, (0.25 + 0.75) / 2, 0.875])
    assert np.isnan(lost[0, 3, 0, 0])


def test_lost_mass_by_age_keeps_traces_and_units_apart(make_trace: MakeTrace) -> None:
    traces = [make_trace(name, seed=seed) for seed, name in enumerate("abc")]
    lost = TraceBatch(traces).lost_by_age
    assert lost.shape == (3, 4, 2, 3)
    for i, trace in enumerate(traces):
        alone = 1 - np.nanmean(trace.recovered_mass.astype(np.float64), axis=0)
        np.testing.assert_allclose(lost[i], alone)


def test_a_step_that_was_not_measured_does_not_count_in_lost_mass(make_trace: MakeTrace) -> None:
    mass = np.full((6, 4, 1, 1), 0.75)
    mass[3, 0] = np.nan
    mass[4, 0] = 0.25
    lost = TraceBatch([make_trace(units=(1, 1), recovered_mass=mass)]).lost_by_age
    np.testing.assert_allclose(lost[0, 0, 0, 0], (4 * 0.25 + 0.75) / 5)
