from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import Trace
from traces.summary import (
    MASS_EDGES,
    SIMILARITY_EDGES,
    Summary,
    doubling_ages,
    quantiles_over_units,
    summarise,
)
from traces.trace import BY_AGE

MakeTrace = Callable[..., Trace]
NAN = np.nan


@pytest.fixture
def small(make_trace: MakeTrace) -> Trace:
    """Three steps, ages 1 and 2, one layer of two heads, with numbers that can be added by hand."""
    trace = make_trace(n_steps=3, max_age=2, units=(1, 2), n_prompt_tokens=7)

    def by_age(first: list[list[float]], second: list[list[float]]) -> np.ndarray:
        # Lists over (steps, ages) of either head.
        return np.stack([first, second], axis=-1)[:, :, None, :].astype(np.float32)

    return dataclasses.replace(
        trace,
        recovered_mass=by_age([[0.8, NAN], [0.6, 0.4], [0.4, 0.2]], [[1.0, NAN], [1.0, 0.5], [1.0, 1.0]]),
        query_similarity=by_age([[0.5, NAN], [0.5, -1.0], [0.5, 0.0]], [[1.0, NAN], [1.0, 1.0], [1.0, 1.0]]),
        overlap=by_age([[0.5, NAN], [0.25, 0.0], [0.0, 0.5]], [[1.0, NAN], [1.0, 1.0], [1.0, 0.5]]),
        fresh_mass=np.float32([[[0.9, 1.0]], [[0.7, 1.0]], [[0.8, 1.0]], [[0.8, 1.0]]]),
        token_log_prob=np.float32([-1.0, -3.0, NAN]),
    )


def assert_equal(mine: Summary, theirs: Summary) -> None:
    for field in dataclasses.fields(Summary):
        left, right = getattr(mine, field.name), getattr(theirs, field.name)
        if hasattr(left, "total"):
            np.testing.assert_array_equal(left.count, right.count, err_msg=field.name)
            np.testing.assert_allclose(left.total, right.total, rtol=1e-12, atol=1e-12, err_msg=field.name)
        else:
            np.testing.assert_array_equal(left, right, err_msg=field.name)


class TestByHand:
    def test_counts(self, small: Trace) -> None:
        summary = Summary.of(small)
        assert (summary.n_traces, summary.n_steps, summary.n_prompt_tokens) == (1, 3, 7)
        assert (summary.max_age, summary.units) == (2, (1, 2))

    def test_recovered_mass_by_unit_is_the_mean_over_the_steps_that_have_the_age(self, small: Trace) -> None:
        np.testing.assert_allclose(
            Summary.of(small).by_unit("recovered_mass"), [[[0.6, 1.0]], [[0.3, 0.75]]], rtol=1e-6
        )

    def test_recovered_mass_by_age_is_the_mean_over_steps_and_units(self, small: Trace) -> None:
        np.testing.assert_allclose(Summary.of(small).by_age("recovered_mass"), [0.8, 0.525], rtol=1e-6)

    def test_overlap_and_query_similarity_by_age(self, small: Trace) -> None:
        summary = Summary.of(small)
        np.testing.assert_allclose(summary.by_age("overlap"), [0.625, 0.5], rtol=1e-6)
        np.testing.assert_allclose(summary.by_unit("overlap")[:, 0, 0], [0.25, 0.25], rtol=1e-6)
        np.testing.assert_allclose(summary.by_age("query_similarity"), [0.75, 0.25], rtol=1e-6)

    def test_fresh_mass_counts_the_last_token_of_the_prompt(self, small: Trace) -> None:
        summary = Summary.of(small)
        np.testing.assert_allclose(summary.fresh_mass.mean(), [[0.8, 1.0]], rtol=1e-6)
        assert summary.mean_fresh_mass == pytest.approx(0.9)

    def test_nll_per_token_passes_over_the_last_step_whose_next_token_is_unknown(self, small: Trace) -> None:
        assert Summary.of(small).nll_per_token == pytest.approx(2.0)

    def test_joint_counts_every_recorded_value_in_its_bin(self, small: Trace) -> None:
        joint = Summary.of(small).joint
        assert joint.sum() == 10
        # Similarity 1 and mass 1 belong in the last bins and not beyond them: steps 0, 1, 2 at age 1, step 2 at age 2.
        assert joint[-1, -1] == 4
        assert joint[0, 40] == 1  # similarity -1, mass 0.4
        assert joint[100, 20] == 1  # similarity 0, mass 0.2
        assert joint[150].sum() == 3  # similarity 0.5

    def test_mass_by_similarity_is_the_mean_of_the_bin(self, small: Trace) -> None:
        mean = Summary.of(small).mass_by_similarity.mean()
        np.testing.assert_allclose(mean[[0, 100, 150, 199]], [0.4, 0.2, 0.6, 0.9], rtol=1e-6)
        assert np.isnan(np.delete(mean, [0, 100, 150, 199])).all()


def test_a_value_in_the_middle_of_a_bin_is_counted_between_its_edges(make_trace: MakeTrace) -> None:
    trace = make_trace(n_steps=40, max_age=5, seed=3)
    recorded = ~np.isnan(trace.recovered_mass)
    expected, _, _ = np.histogram2d(
        trace.query_similarity[recorded], trace.recovered_mass[recorded], bins=(SIMILARITY_EDGES, MASS_EDGES)
    )
    np.testing.assert_array_equal(Summary.of(trace).joint, expected)


def test_a_cosine_rounded_beyond_1_counts_in_the_last_bin(small: Trace) -> None:
    beyond = dataclasses.replace(small, query_similarity=small.query_similarity * np.float32(1.0000002))
    assert Summary.of(beyond).joint[-1].sum() == 5
    assert Summary.of(beyond).joint.sum() == 10


def test_a_value_that_only_one_of_both_arrays_has_is_not_in_the_joint_table(small: Trace) -> None:
    similarity = small.query_similarity.copy()
    similarity[0] = NAN
    summary = Summary.of(dataclasses.replace(small, query_similarity=similarity))
    assert summary.joint.sum() == 8
    assert summary.recovered_mass.count.sum() == 10


def test_an_age_that_no_step_has_is_nan_without_a_warning(make_trace: MakeTrace) -> None:
    summary = Summary.of(make_trace(n_steps=2, max_age=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        means = [summary.by_age(name) for name in BY_AGE]
        quantiles = quantiles_over_units(summary.by_unit("overlap"), (0.5,))
    for mean in means:
        np.testing.assert_array_equal(np.isnan(mean), [False, False, True, True])
    np.testing.assert_array_equal(np.isnan(quantiles), [[False, False, True, True]])


def test_a_trace_without_steps_has_no_means(make_trace: MakeTrace) -> None:
    summary = Summary.of(make_trace(n_steps=0))
    assert np.isnan(summary.by_unit("recovered_mass")).all()
    assert np.isnan(summary.nll_per_token)
    assert not np.isnan(summary.mean_fresh_mass)


def test_an_array_that_is_not_by_age_is_refused(small: Trace) -> None:
    with pytest.raises(ValueError, match="'fresh_mass' is not recorded by age: take one of recovered_mass"):
        Summary.of(small).by_age("fresh_mass")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    max_age=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_streaming_traces_equals_one_mean_over_all_of_them(
    make_trace: MakeTrace, lengths: list[int], max_age: int, seed: int
) -> None:
    traces = [make_trace(n_steps=n, max_age=max_age, seed=seed + i) for i, n in enumerate(lengths)]
    overall, _ = summarise(iter(traces))
    for name in (*BY_AGE, "fresh_mass"):
        stacked = np.concatenate([getattr(trace, name) for trace in traces]).astype(np.float64)
        counts = (~np.isnan(stacked)).sum(axis=0)
        expected = np.divide(np.nansum(stacked, axis=0), counts, out=np.full(counts.shape, NAN), where=counts > 0)
        mean = overall.fresh_mass.mean() if name == "fresh_mass" else overall.by_unit(name)
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)
    assert overall.joint.sum() == sum(int((~np.isnan(trace.overlap)).sum()) for trace in traces)


def test_the_order_of_traces_does_not_matter(make_trace: MakeTrace) -> None:
    traces = [make_trace(kind=kind, n_steps=n, seed=n) for kind, n in (("a", 3), ("b", 5), ("a", 7), ("b", 2))]
    forward, forward_kinds = summarise(traces)
    backward, backward_kinds = summarise(reversed(traces))
    assert_equal(forward, backward)
    assert list(forward_kinds) == list(backward_kinds) == ["a", "b"]
    for kind in forward_kinds:
        assert_equal(forward_kinds[kind], backward_kinds[kind])


def test_a_kind_is_summarised_as_if_it_were_alone(make_trace: MakeTrace) -> None:
    poems = [make_trace(kind="poem", seed=i) for i in range(3)]
    overall, by_kind = summarise([*poems, make_trace(kind="code", seed=9)])
    assert_equal(by_kind["poem"], summarise(poems)[0])
    assert_equal(by_kind["poem"] + by_kind["code"], overall)
    assert (by_kind["poem"].n_traces, by_kind["code"].n_traces, overall.n_traces) == (3, 1, 4)


def test_longer_traces_weigh_more(make_trace: MakeTrace) -> None:
    def constant(n_steps: int, value: float) -> Trace:
        trace = make_trace(n_steps=n_steps, max_age=1)
        return dataclasses.replace(trace, recovered_mass=np.full_like(trace.recovered_mass, value))

    overall, _ = summarise([constant(1, 0.0), constant(3, 1.0)])
    assert overall.by_age("recovered_mass") == pytest.approx([0.75])


@pytest.mark.parametrize("order", [1, -1], ids=["older first", "younger first"])
def test_traces_that_reach_different_ages_share_the_ages_that_both_have(make_trace: MakeTrace, order: int) -> None:
    old, young = make_trace(max_age=5, seed=1), make_trace(max_age=2, seed=2)
    overall, _ = summarise([old, young][::order])
    assert overall.max_age == 5
    np.testing.assert_array_equal(
        overall.overlap.count[:, 0, 0], Summary.of(old).overlap.count[:, 0, 0] + [6, 5, 0, 0, 0]
    )
    np.testing.assert_allclose(overall.by_age("overlap")[2:], Summary.of(old).by_age("overlap")[2:])


def test_traces_of_two_shapes_are_refused(make_trace: MakeTrace) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        summarise([make_trace(units=(2, 3)), make_trace(units=(3, 3))])


def test_no_traces_are_refused() -> None:
    with pytest.raises(ValueError, match="no traces"):
        summarise([])


def test_one_trace_is_held_at_a_time(make_trace: MakeTrace) -> None:
    alive: list[weakref.ref[Trace]] = []
    most = 0

    def fresh(seed: int) -> Trace:
        trace = make_trace(seed=seed)
        alive.append(weakref.ref(trace))
        return trace

    def traces() -> Iterator[Trace]:
        nonlocal most
        for seed in range(4):
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            yield fresh(seed)

    summarise(traces())
    assert most == 0


def test_the_summary_has_one_size_however_long_the_trace(make_trace: MakeTrace) -> None:
    short, long = Summary.of(make_trace(n_steps=4)), Summary.of(make_trace(n_steps=40))
    for field in dataclasses.fields(Summary):
        left, right = getattr(short, field.name), getattr(long, field.name)
        assert np.shape(getattr(left, "total", left)) == np.shape(getattr(right, "total", right))


@pytest.mark.parametrize(("max_age", "ages"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_doubling_ages_are_the_powers_of_two_up_to_the_oldest(max_age: int, ages: list[int]) -> None:
    assert doubling_ages(max_age) == ages
