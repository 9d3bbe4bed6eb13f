"""What every policy promises, whoever wrote it: built-in kinds and installed plug-ins alike.

A new kind needs an example in `SCALAR` and, if it has per-unit parameters, in `PER_UNIT`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from policies import (
    FEATURES,
    MEASURED_SIGNALS,
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    ModelShape,
    NeverFull,
    PolicyFile,
    RandomRefresh,
    RefreshKeys,
    Schedule,
    Selection,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    check_fits,
    known_kinds,
    policy_class,
    policy_from_json,
    policy_to_json,
)

Make = Callable[..., StepSignals]

UNITS = (2, 3)
TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.0))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
SOME = ((1.0, 0.0, 1.0), (0.0, 0.0, 1.0))
COSINE = CosineThreshold(0.85)
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, 1.5, 0.7, 2, 0.3), intercept=-2.5, threshold=0.3)

SCALAR: dict[str, list[StepPolicy]] = {
    "always_full": [AlwaysFull()],
    "never_full": [NeverFull()],
    "fixed_stride": [FixedStride(10), FixedStride(2.5, phase=1), FixedStride(1), FixedStride(1, phase=0.3)],
    "cosine_threshold": [COSINE, CosineThreshold(0.5, check_every=5), CosineThreshold(-1)],
    "layer_cosine": [LayerCosine(0.85), LayerCosine(0.5, check_every=1), LayerCosine(-1)],
    "sentence_boundary": [SentenceBoundary((3, 7, 5)), SentenceBoundary((0,), max_age=4), SentenceBoundary((9,), 1e6)],
    "random_refresh": [RandomRefresh(0.3, 0.61803, 0.25), RandomRefresh(0, 0.1, 0), RandomRefresh(1, 0, 0.999)],
    "learned_logistic": [
        LOGISTIC,
        LearnedLogistic((), (), intercept=0.1),
        LearnedLogistic(("age", "query_drift"), (0.5, 2), intercept=-3),
    ],
    "max_age": [MaxAge(NeverFull(), 4), MaxAge(COSINE, 20), MaxAge(NeverFull(), 1)],
    "budget_constrained": [
        BudgetConstrained(AlwaysFull(), 0.1),
        BudgetConstrained(LOGISTIC, 0.29, burst=1.5),
        BudgetConstrained(MaxAge(COSINE, 20), 1 / 3),
    ],
    "refresh_keys": [
        RefreshKeys(COSINE),
        RefreshKeys(BudgetConstrained(LOGISTIC, 0.2), units=0),
        RefreshKeys(MaxAge(NeverFull(), 4), units=1.0),
    ],
}
PER_UNIT: dict[str, list[StepPolicy]] = {
    "fixed_stride": [FixedStride(TABLE), FixedStride(4, phase=TABLE), FixedStride(TABLE, phase=TABLE)],
    "cosine_threshold": [CosineThreshold(SHARES, check_every=TABLE), CosineThreshold(SHARES)],
    "layer_cosine": [LayerCosine(SHARES, check_every=TABLE), LayerCosine(0.3, check_every=TABLE)],
    "sentence_boundary": [SentenceBoundary((3, 7, 5), max_age=TABLE)],
    "random_refresh": [
        RandomRefresh.drawn(0.2, UNITS, seed=0),
        RandomRefresh(SHARES, 0.123, phase=((0.0, 0.5, 0.9), (0.1, 0.2, 0.3))),
    ],
    "learned_logistic": [
        LearnedLogistic(("age",), (SHARES,), intercept=-1),
        LearnedLogistic(("sqrt_age", "query_drift"), (0.3, SHARES), intercept=TABLE),
        LearnedLogistic(("refresh_loss", "refresh_churn"), (TABLE, SHARES), intercept=SHARES, threshold=0.9),
    ],
    "max_age": [MaxAge(COSINE, TABLE), MaxAge(FixedStride(TABLE), 5)],
    "budget_constrained": [
        BudgetConstrained(AlwaysFull(), SHARES, burst=TABLE),
        BudgetConstrained(FixedStride(TABLE), 0.1),
        BudgetConstrained(FixedStride(TABLE), 1),
        BudgetConstrained(CosineThreshold(SHARES), SHARES),
    ],
    "refresh_keys": [
        RefreshKeys(COSINE, units=SOME),
        RefreshKeys(FixedStride(TABLE)),
        RefreshKeys(BudgetConstrained(AlwaysFull(), SHARES), units=SOME),
    ],
}


def named(*tables: dict[str, list[StepPolicy]]) -> list[Any]:
    return [
        pytest.param(policy, id=f"{kind}-{'per_unit' if table is PER_UNIT else 'scalar'}-{number}")
        for table in tables
        for kind, examples in table.items()
        for number, policy in enumerate(examples)
    ]


every_policy = pytest.mark.parametrize("policy", named(SCALAR, PER_UNIT))
on_random_signals = given(seed=st.integers(0, 2**32 - 1))
some_examples = settings(max_examples=20, deadline=None)


def and_inner(policy: StepPolicy) -> list[StepPolicy]:
    """A policy, and those inside of it."""
    return [policy, *(one for inner in policy.inner_policies() for one in and_inner(inner))]


def is_wrapper(policy: StepPolicy) -> bool:
    return any(isinstance(getattr(policy, field.name), StepPolicy) for field in dataclasses.fields(policy))


def with_inner(policy: StepPolicy, change: Callable[[StepPolicy], StepPolicy]) -> StepPolicy:
    """The same wrapper around other policies."""
    inner = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    changed = {name: change(value) for name, value in inner.items() if isinstance(value, StepPolicy)}
    return dataclasses.replace(policy, **changed)


def decide(policy: StepPolicy, signals: StepSignals) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Decision and reasons as NumPy arrays."""
    reasons: dict[str, Any] = {}
    full = policy.decide(dataclasses.replace(signals, reasons=reasons))
    assert isinstance(full, type(signals.age))
    assert full.dtype in (np.dtype(bool), torch.bool)
    assert full.shape == signals.age.shape
    return np.array(full.tolist()), {reason: np.array(units.tolist()) for reason, units in reasons.items()}


def assert_same(mine: tuple[np.ndarray, dict[str, np.ndarray]], theirs: tuple[np.ndarray, Any]) -> None:
    np.testing.assert_array_equal(mine[0], theirs[0])
    np.testing.assert_equal(mine[1], theirs[1])


class TestEveryKindIsTested:
    @pytest.mark.parametrize("kind", known_kinds())
    def test_every_kind_has_an_example(self, kind: str) -> None:
        assert SCALAR.get(kind), f"policy kind {kind!r} has no example in tests/policies/test_contract.py: add one."
        assert {policy.kind for policy in SCALAR[kind] + PER_UNIT.get(kind, [])} == {kind}

    @pytest.mark.parametrize("kind", known_kinds())
    def test_every_kind_with_per_unit_parameters_has_a_per_unit_example(self, kind: str) -> None:
        types = [str(field.type) for field in dataclasses.fields(policy_class(kind))]  # type: ignore[arg-type]
        if any("PerUnit" in name or "StepPolicy" in name for name in types):
            assert PER_UNIT.get(kind), f"policy kind {kind!r} has no per-unit example in {__file__}: add one."


@every_policy
class TestDecisions:
    @some_examples
    @on_random_signals
    def test_torch_decides_as_numpy_does(
        self, policy: StepPolicy, random_signals: Make, on_torch: Make, in_layer: Make, seed: int
    ) -> None:
        signals = random_signals(seed)
        assert_same(decide(policy, on_torch(signals)), decide(policy, signals))
        for layer in range(UNITS[0]):
            units = in_layer(signals, layer)
            assert_same(decide(policy, on_torch(units)), decide(policy, units))

    @some_examples
    @on_random_signals
    def test_a_layer_alone_is_decided_as_among_all_layers(
        self, policy: StepPolicy, random_signals: Make, in_layer: Make, seed: int
    ) -> None:
        signals = random_signals(seed)
        full, reasons = decide(policy, signals)
        for layer in range(UNITS[0]):
            of_layer = {reason: units[:, layer] for reason, units in reasons.items()}
            assert_same(decide(policy, in_layer(signals, layer)), (full[:, layer], of_layer))

    @some_examples
    @on_random_signals
    def test_units_that_always_run_full_do(self, policy: StepPolicy, random_signals: Make, seed: int) -> None:
        signals = random_signals(seed)
        full, _ = decide(policy, signals)
        always = np.broadcast_to(np.asarray(policy.always_full) == 1, full.shape)
        assert full[always].all()
        # As a schedule leads there: whoever always ran full has run full at every step.
        after_full = dataclasses.replace(signals, n_full=signals.step, age=np.ones_like(signals.age))
        assert decide(policy, after_full)[0][always].all()

    def test_no_value_is_ever_looked_at(self, policy: StepPolicy, random_signals: Make, in_layer: Make) -> None:
        # A meta tensor has no values: code that branches on one, or copies one to the host, fails on it.
        for signals in (random_signals(0), in_layer(random_signals(0), 1)):
            arrays = {name: torch.empty(signals.age.shape, dtype=torch.float64, device="meta") for name in SIGNALS}
            full = policy.decide(dataclasses.replace(signals, reasons={}, **arrays))
            assert (full.shape, full.dtype) == (signals.age.shape, torch.bool)

    @some_examples
    @on_random_signals
    def test_deciding_twice_gives_the_same_and_leaves_the_signals_alone(
        self, policy: StepPolicy, random_signals: Make, on_torch: Make, seed: int
    ) -> None:
        for signals in (random_signals(seed), on_torch(random_signals(seed))):
            before = repr([getattr(signals, name).tolist() for name in SIGNALS])
            assert_same(decide(policy, signals), decide(policy, signals))
            after = repr([getattr(signals, name).tolist() for name in SIGNALS])
            assert after == before

    def test_asking_for_reasons_changes_no_decision(self, policy: StepPolicy, random_signals: Make) -> None:
        np.testing.assert_array_equal(policy.decide(random_signals(1)), decide(policy, random_signals(1))[0])


@every_policy
class TestNeeds:
    def test_needs_are_measured_signals(self, policy: StepPolicy) -> None:
        assert isinstance(policy.needs, frozenset)
        assert policy.needs <= MEASURED_SIGNALS

    @some_examples
    @on_random_signals
    def test_without_a_signal_that_it_needs_a_policy_runs_full(
        self, policy: StepPolicy, random_signals: Make, on_torch: Make, seed: int
    ) -> None:
        # A wrapper may have the last word: a budget denies also what NaN asks for.
        signals = random_signals(seed)
        for name in () if is_wrapper(policy) else policy.needs:
            unmeasured = dataclasses.replace(signals, **{name: np.full_like(signals.age, np.nan)})
            assert policy.decide(unmeasured).all()
            assert policy.decide(on_torch(unmeasured)).all()

    @some_examples
    @on_random_signals
    def test_a_signal_that_it_does_not_need_changes_nothing(
        self, policy: StepPolicy, random_signals: Make, seed: int
    ) -> None:
        signals = random_signals(seed)
        unmeasured = dict.fromkeys(MEASURED_SIGNALS - policy.needs, np.full_like(signals.age, np.nan))
        assert_same(decide(policy, dataclasses.replace(signals, **unmeasured)), decide(policy, signals))


@every_policy
class TestKeysOnly:
    def test_units_are_in_the_mode_or_not_and_count_half_if_they_are(self, policy: StepPolicy) -> None:
        keys_only = np.broadcast_to(np.asarray(policy.keys_only), UNITS)
        assert np.isin(keys_only, (0, 1)).all()
        np.testing.assert_array_equal(np.broadcast_to(np.asarray(policy.full_cost), UNITS), 1 - keys_only / 2)
        hash(policy.keys_only)

    def test_a_policy_is_not_in_the_mode_unless_somebody_says_so(self, policy: StepPolicy) -> None:
        if not isinstance(policy, RefreshKeys):
            assert policy.keys_only == 0

    def test_a_wrapper_says_what_its_inner_policy_says(self, policy: StepPolicy) -> None:
        if is_wrapper(policy) and not isinstance(policy, RefreshKeys):
            assert with_inner(policy, lambda inner: RefreshKeys(inner, SOME)).keys_only == SOME

    def test_the_mode_changes_no_decision(self, policy: StepPolicy, random_signals: Make) -> None:
        signals = random_signals(2)
        assert_same(decide(RefreshKeys(policy, SOME), signals), decide(policy, signals))
        assert RefreshKeys(policy, SOME).needs == policy.needs


@every_policy
def test_at_no_step_has_a_policy_taken_more_than_its_highest_rate_allows(policy: StepPolicy) -> None:
    rng, schedule = np.random.default_rng(0), Schedule(np.zeros(UNITS), np.full(UNITS, 0.5))
    rate = np.broadcast_to(np.asarray(policy.highest_rate, dtype=np.float64), UNITS)
    hash(policy.highest_rate)
    assert ((rate >= 0) & (rate <= 1)).all()
    bursts = sum(np.asarray(one.burst) for one in and_inner(policy) if isinstance(one, BudgetConstrained))
    for step in range(1, 150):
        similarity = dict.fromkeys(
            ("query_similarity", "step_similarity", "layer_similarity"), rng.uniform(-1, 1, UNITS)
        )
        full = policy.decide(schedule.signals(**similarity, token=np.full(UNITS, rng.integers(0, 20))))
        schedule.advance(full, rng.random(UNITS), rng.random(UNITS))
        assert (schedule.n_full <= rate * step + (rate > 0) + bursts + 1e-9).all()


@every_policy
class TestValues:
    def test_a_policy_is_frozen(self, policy: StepPolicy) -> None:
        for name in (*(field.name for field in dataclasses.fields(policy)), "anything"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(policy, name, 1)

    def test_a_policy_comes_back_from_json_equal_and_with_the_same_hash(self, policy: StepPolicy) -> None:
        loaded = policy_from_json(json.loads(json.dumps(policy_to_json(policy), allow_nan=False)))
        assert type(loaded) is type(policy)
        assert loaded == policy
        assert hash(loaded) == hash(policy)
        assert policy_to_json(loaded) == policy_to_json(policy)

    def test_its_file_is_valid_by_the_published_schema(self, policy: StepPolicy, model: ModelShape) -> None:
        schema = json.loads(Path(policies.__file__).with_name("policy.schema.json").read_text())
        values = json.loads(json.dumps(PolicyFile(policy, Selection(64), model).to_json()))
        jsonschema.Draft202012Validator(schema).validate(values)
        assert PolicyFile.from_json(values).policy == policy


@pytest.mark.parametrize("policy", named(SCALAR))
def test_a_policy_of_single_numbers_fits_every_model(policy: StepPolicy, model: ModelShape) -> None:
    assert policy.unit_shapes() == frozenset()
    check_fits(policy, dataclasses.replace(model, layers=30, kv_heads=1))


@pytest.mark.parametrize("policy", named(PER_UNIT))
def test_a_per_unit_policy_fits_its_own_model_and_refuses_another_naming_both(
    policy: StepPolicy, model: ModelShape
) -> None:
    assert policy.unit_shapes() == {UNITS}
    check_fits(policy, model)
    for layers, kv_heads in ((3, 3), (2, 1), (3, 2)):
        other = dataclasses.replace(model, id="other", layers=layers, kv_heads=kv_heads)
        with pytest.raises(ValueError, match="2 layers x 3 KV heads") as error:
            check_fits(policy, other)
        assert f"other has {layers} layers x {kv_heads} KV heads" in str(error.value)
