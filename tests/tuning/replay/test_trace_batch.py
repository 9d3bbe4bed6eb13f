from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from policies import CosineThreshold, FixedStride
from traces import Trace, write_trace
from tuning import TraceBatch, replay_full_share, replay_policy

MakeTrace = Callable[..., Trace]

SMAPS = Path("/proc/self/smaps")


def test_a_batch_has_the_shape_of_its_traces(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace(name, n_steps=5, max_age=3, units=(2, 3)) for name in "abcd"])
    assert (len(batch), batch.shape, batch.n_steps, batch.max_age, batch.units) == (4, (4, 2, 3), 5, 3, (2, 3))


def test_units_of_a_trace_lie_in_a_row(make_trace: MakeTrace) -> None:
    traces = [make_trace(name, n_steps=5, max_age=3, units=(2, 3), seed=seed) for seed, name in enumerate("ab")]
    batch = TraceBatch(traces)
    for i, trace in enumerate(traces):
        assert batch.of_trace("overlap", i).shape == (5, 3, 6)
        np.testing.assert_array_equal(batch.of_trace("overlap", i).reshape(trace.overlap.shape), trace.overlap)
        np.testing.assert_array_equal(batch.of_trace("fresh_mass", i).reshape(6, 2, 3), trace.fresh_mass)
    with pytest.raises(ValueError, match="read-only"):
        batch.of_trace("overlap", 0)[:] = 0
    traces[0].overlap[:] = 0  # What is in memory stays its owner's.


def test_single_numbers_come_from_the_trace_and_the_place_asked_for(make_trace: MakeTrace) -> None:
    traces = [make_trace(name, n_steps=8, max_age=3, seed=seed) for seed, name in enumerate("abc")]
    rng = np.random.default_rng(0)
    trace, step, age, layer, head = (rng.integers(0, n, 50) for n in (3, 8, 3, 2, 3))
    found = TraceBatch(traces).at_age("overlap", trace, step, age + 1, layer, head)
    stacked = np.stack([each.overlap for each in traces])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, stacked[trace, step, age, layer, head])


def test_every_age_of_a_trace_is_what_single_numbers_are(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace(n_steps=30, ages=[1, 2, 4, 7, 12, 20])])
    every = batch.at_all_ages("overlap", 0)
    assert every.shape == (30, 20, 6)
    step, age = (axis.ravel() for axis in np.indices((30, 20)))
    there_is_one = age <= step
    assert np.isnan(every[step[~there_is_one], age[~there_is_one]]).all()
    step, age = step[there_is_one], age[there_is_one]
    for unit in range(6):
        layer, head = np.full_like(step, unit // 3), np.full_like(step, unit % 3)
        found = batch.at_age("overlap", np.zeros_like(step), step, age + 1, layer, head)
        np.testing.assert_allclose(every[step, age, unit], found)


def test_the_prompts_set_is_older_by_one_at_each_step(make_trace: MakeTrace) -> None:
    trace = make_trace(n_steps=6, max_age=4)
    lost = TraceBatch([trace]).lost_since_prompt
    assert lost.shape == (1, 6, 2, 3)
    mass = trace.recovered_mass.astype(np.float64)
    # Beyond the oldest recorded age, a set of that age stands in.
    np.testing.assert_array_equal(1 - lost[0], mass[range(6), [0, 1, 2, 3, 3, 3]])


def test_kinds_and_headers_follow_the_order_of_the_files(make_trace: MakeTrace) -> None:
    batch = TraceBatch([make_trace("b", "code"), make_trace("a", "prose"), make_trace("c", "code")])
    assert batch.kinds == ("code", "prose", "code")
    assert [header.prompt["name"] for header in batch.headers] == ["b", "a", "c"]


def test_a_trace_on_disk_and_one_in_memory_are_the_same(make_trace: MakeTrace, tmp_path: Path) -> None:
    traces = [make_trace(name, seed=seed) for seed, name in enumerate("ab")]
    files = [write_trace(trace, tmp_path) for trace in traces]
    in_memory = TraceBatch(traces)
    for batch in (TraceBatch(files), TraceBatch([traces[0], files[1]])):
        for name in ("recovered_mass", "query_similarity", "overlap", "fresh_mass"):
            for i in range(2):
                np.testing.assert_array_equal(batch.of_trace(name, i), in_memory.of_trace(name, i))
        np.testing.assert_array_equal(batch.lost_by_age, in_memory.lost_by_age)
        np.testing.assert_array_equal(batch.step_tokens, in_memory.step_tokens)


def resident_share(path: Path) -> float:
    """How much of a file is mapped into memory and has been touched."""
    parts = SMAPS.read_text().split(str(path))[1:]
    kib = sum(int(line.split()[1]) for part in parts for line in part.splitlines()[1:6] if line.startswith("Rss:"))
    return kib * 1024 / path.stat().st_size


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not tell what is in memory")
def test_of_a_trace_on_disk_only_what_is_used_comes_into_memory(make_trace: MakeTrace, tmp_path: Path) -> None:
    # The arrays by age make up nearly all of the file, a third each.
    file = write_trace(make_trace(n_steps=128, max_age=64, units=(30, 3)), tmp_path)
    batch = TraceBatch([file])
    replay_full_share(batch, FixedStride(3))
    assert resident_share(file.path) < 0.1
    replay_full_share(batch, CosineThreshold(-1.0))
    assert 0.2 < resident_share(file.path) < 0.45
    replay_policy(batch, CosineThreshold(-1.0))
    assert 0.4 < resident_share(file.path) < 0.75


def test_a_batch_keeps_the_traces_that_it_was_made_of_when_their_files_are_replaced(
    make_trace: MakeTrace, tmp_path: Path
) -> None:
    old, new = make_trace(n_steps=9, seed=1), make_trace(n_steps=5, seed=2)
    file = write_trace(old, tmp_path)
    batch = TraceBatch([file])
    write_trace(new, tmp_path)
    again = TraceBatch([file])
    for on_disk, trace in ((batch, old), (again, new)):
        replay, expected = replay_policy(on_disk, CosineThreshold(0.1)), replay_policy(trace, CosineThreshold(0.1))
        np.testing.assert_array_equal(replay.lost_mass, expected.lost_mass)
        np.testing.assert_array_equal(on_disk.step_tokens, TraceBatch([trace]).step_tokens)


def test_what_is_mapped_is_let_go_with_the_batch(make_trace: MakeTrace, tmp_path: Path) -> None:
    file = write_trace(make_trace(), tmp_path)
    batch = TraceBatch([file])
    replay = replay_policy(batch, FixedStride(2))
    whole = batch.traces[0].overlap.base
    assert whole is not None
    assert whole.nbytes == file.path.stat().st_size
    mapped = weakref.ref(whole)
    del whole
    del batch
    gc.collect()
    assert mapped() is None
    assert replay.full.any()


def test_a_trace_that_ends_early_is_refused(make_trace: MakeTrace, tmp_path: Path) -> None:
    file = write_trace(make_trace(), tmp_path)
    whole = file.path.read_bytes()
    _ = file.header
    file.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"one\.safetensors is no whole trace"):
        TraceBatch([file])


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
