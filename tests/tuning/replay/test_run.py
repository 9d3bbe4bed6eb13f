from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import (
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RefreshKeys,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
)
from traces import Trace
from tuning import TraceBatch, replay_policy

MakeTrace = Callable[..., Trace]

# At [t, a - 1]: what the set of age a would have at step t. 9 stands where there is no such set.
MASS = np.array([[0.9, 9, 9, 9], [0.8, 0.7, 9, 9], [0.6, 0.5, 0.4, 9], [0.3, 0.2, 0.1, 0.05]])


def one_unit(make_trace: MakeTrace, **arrays: Any) -> Trace:
    arrays = {name: np.asarray(values)[..., None, None] for name, values in ({"recovered_mass": MASS} | arrays).items()}
    return make_trace(n_steps=4, max_age=arrays["recovered_mass"].shape[1], units=(1, 1), **arrays)


def decisions(trace: Trace, policy: StepPolicy) -> list[bool]:
    return replay_policy(trace, policy).full[:, 0, 0, 0].tolist()


def test_a_stride_of_two_loses_what_sets_of_age_one_miss(make_trace: MakeTrace) -> None:
    replay = replay_policy(one_unit(make_trace), FixedStride(2))
    assert replay.full[:, 0, 0, 0].tolist() == [False, True, False, True]
    np.testing.assert_allclose(replay.lost_mass[:, 0, 0, 0], [0.1, 0, 0.4, 0], atol=1e-7)
    assert (replay.full_share, replay.beyond_max_age) == (0.5, 0)
    assert replay.recovered_mass == pytest.approx(1 - 0.5 / 4, abs=1e-7)


def test_a_set_that_is_never_refreshed_grows_a_step_older_at_each_step(make_trace: MakeTrace) -> None:
    replay = replay_policy(one_unit(make_trace), NeverFull())
    np.testing.assert_allclose(replay.lost_mass[:, 0, 0, 0], [0.1, 0.3, 0.6, 0.95], atol=1e-7)
    assert (replay.full_share, replay.beyond_max_age) == (0, 0)


@pytest.mark.parametrize("wrap", [lambda policy: policy, lambda policy: BudgetConstrained(policy, 0.1)])
def test_a_signal_that_traces_do_not_record_is_refused_by_name(make_trace: MakeTrace, wrap: Any) -> None:
    policy = wrap(LayerCosine(0.5))
    message = f"the policy '{policy.kind}' needs the signal 'layer_similarity', which traces do not record"
    with pytest.raises(ValueError, match=message):
        replay_policy(one_unit(make_trace), policy)


def test_traces_whose_prompts_differ_in_length_are_fed_their_own_tokens(make_trace: MakeTrace) -> None:
    short = make_trace("short", n_steps=4)
    prompt = short.header.prompt | {"name": "long", "n_prompt_tokens": 9}
    tokens = np.arange(13, dtype=np.int32)
    long = dataclasses.replace(short, header=dataclasses.replace(short.header, prompt=prompt), tokens=tokens)
    batch = TraceBatch([short, long])
    assert batch.step_tokens.shape == (4, 2, 1, 1)
    np.testing.assert_array_equal(batch.step_tokens[:, 0, 0, 0], short.tokens[5:])
    assert batch.step_tokens[:, 1, 0, 0].tolist() == [9.0, 10.0, 11.0, 12.0]
    full = replay_policy(batch, SentenceBoundary((10, 12), max_age=1000)).full[:, 1]
    assert full.all((1, 2)).tolist() == full.any((1, 2)).tolist() == [False, True, False, True]


def test_always_full_loses_nothing(make_trace: MakeTrace) -> None:
    replay = replay_policy(one_unit(make_trace), AlwaysFull())
    assert (replay.full_share, replay.recovered_mass, replay.beyond_max_age) == (1, 1, 0)


def test_beyond_the_oldest_age_recorded_the_oldest_stands_in_and_is_reported(make_trace: MakeTrace) -> None:
    trace = one_unit(make_trace, recovered_mass=MASS[:, :2])
    replay = replay_policy(trace, NeverFull())
    np.testing.assert_allclose(replay.lost_mass[:, 0, 0, 0], [0.1, 0.3, 0.5, 0.8], atol=1e-7)
    assert replay.beyond_max_age == 2 / 4
    # Full at step 3, where age 4 is not used: of three recycled steps one is beyond.
    assert replay_policy(trace, FixedStride(4)).beyond_max_age == pytest.approx(1 / 3)


def test_a_cosine_is_read_at_the_age_of_the_set(make_trace: MakeTrace) -> None:
    similarity = [[0.9, 9, 9, 9], [0.1, 0.8, 9, 9], [0.9, 0.1, 0.2, 9], [0.9, 0.4, 0.9, 0.9]]
    trace = one_unit(make_trace, query_similarity=similarity)
    # Ages met: 1, 2, 3 -> full at step 2, then age 1.
    assert decisions(trace, CosineThreshold(0.5)) == [False, False, True, False]
    assert decisions(trace, CosineThreshold(0.85)) == [False, True, False, True]


def test_the_query_of_the_step_before_is_always_that_of_age_one(make_trace: MakeTrace) -> None:
    similarity = [[0.9, 9, 9, 9], [0.1, 0.9, 9, 9], [0.9, 0.1, 0.1, 9], [0.4, 0.9, 0.9, 0.9]]
    policy = LearnedLogistic(("step_drift",), (1.0,), -0.5)
    assert decisions(one_unit(make_trace, query_similarity=similarity), policy) == [False, True, False, True]


def test_the_mass_of_a_refresh_is_kept_until_the_next(make_trace: MakeTrace) -> None:
    # fresh_mass[0] is the prompt's. Steps with a refresh loss above 0.5 run full.
    policy = LearnedLogistic(("refresh_loss",), (1.0,), -0.5)
    trace = one_unit(make_trace, fresh_mass=[0.9, 0.1, 0.1, 0.1, 0.1])
    assert decisions(trace, policy) == [False] * 4
    trace = one_unit(make_trace, fresh_mass=[0.1, 0.2, 0.9, 0.1, 0.1])
    assert decisions(trace, policy) == [True, True, False, False]


def test_the_overlap_of_a_refresh_is_that_of_the_set_it_replaced(make_trace: MakeTrace) -> None:
    # Not measured until the first full step, at step 0 and age 1; then step 1 replaces age 1, step 3 age 2.
    overlap = [[0.1, 9, 9, 9], [0.8, 0.1, 9, 9], [0.1, 0.1, 0.1, 9], [0.1, 0.1, 0.1, 0.1]]
    policy = LearnedLogistic(("refresh_churn",), (1.0,), -0.5)
    assert decisions(one_unit(make_trace, overlap=overlap), policy) == [True, True, False, False]
    seen = Seen()
    replay_policy(one_unit(make_trace, overlap=overlap), Noting(FixedStride(2), seen, frozenset({"refresh_overlap"})))
    np.testing.assert_allclose(np.ravel(seen["refresh_overlap"]), [np.nan, np.nan, 0.1, 0.1])


class Seen(dict[str, list[np.ndarray]]):
    pass


@dataclass(frozen=True)
class Noting(StepPolicy):
    """Does what another policy does and notes what it was shown."""

    policy: StepPolicy
    seen: Seen
    reads: frozenset[str]
    kind: ClassVar[str] = "noting"

    @property
    def needs(self) -> frozenset[str]:
        return self.reads

    def decide(self, signals: StepSignals) -> Any:
        for name in SIGNALS:
            self.seen.setdefault(name, []).append(np.array(getattr(signals, name), dtype=np.float64))
        return self.policy.decide(signals)


def test_signals_that_a_policy_does_not_declare_are_not_measured(make_trace: MakeTrace) -> None:
    seen = Seen()
    replay_policy(make_trace(), Noting(FixedStride(2), seen, frozenset()))
    for name in ("query_similarity", "step_similarity", "refresh_mass", "refresh_overlap"):
        assert np.isnan(seen[name]).all()


def test_signals_have_the_axes_of_the_batch_and_double_precision(make_trace: MakeTrace) -> None:
    seen = Seen()
    traces = TraceBatch([make_trace(name) for name in "ab"])
    needs = frozenset({"query_similarity", "step_similarity", "refresh_mass", "refresh_overlap"})
    replay_policy(traces, Noting(FixedStride(2), seen, needs))
    assert {np.shape(values) for values in seen.values()} == {(6, 2, 2, 3)}
    assert {array.dtype for values in seen.values() for array in values} == {np.dtype("float64")}


def test_a_similarity_that_was_not_recorded_leads_to_full_attention(make_trace: MakeTrace) -> None:
    similarity = np.ones((4, 4))
    similarity[1, 1] = similarity[3, 1] = np.nan
    trace = one_unit(make_trace, query_similarity=similarity)
    assert decisions(trace, CosineThreshold(0.5)) == [False, True, False, True]
    assert decisions(trace, LearnedLogistic(("query_drift",), (1.0,), -0.5)) == [False, True, False, True]


def test_shares_per_unit_are_those_of_the_units(make_trace: MakeTrace) -> None:
    strides = ((1, 2, 3), (4, 6, 12))
    traces = TraceBatch([make_trace(name, n_steps=12, max_age=12) for name in "ab"])
    replay = replay_policy(traces, FixedStride(strides))
    np.testing.assert_allclose(replay.unit_full_share, 1 / np.array(strides))
    assert replay.full_share == pytest.approx(replay.unit_full_share.mean())


def test_a_table_of_another_shape_is_not_stretched_over_the_units(make_trace: MakeTrace) -> None:
    with pytest.raises(ValueError, match=r"for \(1, 3\) layers and KV heads, but the traces have \(2, 3\)"):
        replay_policy(make_trace(units=(2, 3)), MaxAge(FixedStride(((2, 3, 4),)), 5))


@given(
    seed=st.integers(0, 2**32 - 1),
    asks=st.sampled_from([AlwaysFull(), CosineThreshold(0.3), FixedStride(2.5, 1), MaxAge(CosineThreshold(-0.5), 3)]),
    burst=st.sampled_from([0.0, 1.0, 2.5]),
)
@settings(max_examples=40, deadline=None)
def test_no_unit_and_no_prefix_exceeds_its_bucket(
    make_trace: MakeTrace, seed: int, asks: StepPolicy, burst: float
) -> None:
    rng = np.random.default_rng(seed)
    traces = TraceBatch([make_trace(name, n_steps=20, max_age=7, seed=seed + i) for i, name in enumerate("ab")])
    budget = rng.choice([0, 1 / 3, 0.05, 0.5, 0.99, 1, *rng.random(3)], traces.units)
    full = replay_policy(traces, BudgetConstrained(asks, budget.tolist(), burst)).full
    steps = np.arange(1, 21)[:, None, None, None]
    assert (full.cumsum(0) <= budget * steps + burst + 1e-9).all()
    total = full.sum((1, 2, 3)).cumsum()
    unit_steps = np.arange(1, 21) * full[0].size
    assert (total <= budget.mean() * unit_steps + burst * full[0].size + 1e-6).all()


def test_a_refresh_by_keys_alone_loses_what_the_new_set_misses_and_counts_half(make_trace: MakeTrace) -> None:
    fresh = np.array([1, 0.95, 0.85, 0.75, 0.65])
    trace = one_unit(make_trace, fresh_mass=fresh)
    replay = replay_policy(trace, RefreshKeys(FixedStride(2)))
    assert replay.full[:, 0, 0, 0].tolist() == [False, True, False, True]
    np.testing.assert_allclose(replay.lost_mass[:, 0, 0, 0], [0.1, 0.15, 0.4, 0.35], atol=1e-7)
    assert (replay.full_share, replay.unit_full_share.tolist()) == (0.25, [[0.25]])


def test_only_the_units_that_refresh_by_keys_alone_count_half(make_trace: MakeTrace) -> None:
    units = ((1, 0, 1), (0, 0, 0))
    replay = replay_policy(make_trace(), RefreshKeys(AlwaysFull(), units))
    np.testing.assert_array_equal(replay.unit_full_share, 1 - np.array(units) / 2)
    assert (replay.lost_mass[:, 0, 1] == 0).all()
    np.testing.assert_allclose(replay.lost_mass[:, 0, 0, 0], 1 - make_trace().fresh_mass[1:, 0, 0])
