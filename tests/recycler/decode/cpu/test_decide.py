"""Programs of policies: the kernel computes NumPy's very numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies import (
    FEATURES,
    QUERY_SIGNALS,
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    Op,
    RandomRefresh,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    policy_program,
)
from recycler.decode.cpu.arrays import Signals
from recycler.decode.cpu.decide import SCHEDULE_SIGNALS, as_program, run_program

LAYERS, ROWS, KV_HEADS = 2, 4, 3
TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.0))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
COSINE = CosineThreshold(0.5, check_every=2)
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, SHARES, 0.7, 2, TABLE), intercept=-2.5, threshold=0.3)
POLICIES: list[StepPolicy] = [
    AlwaysFull(),
    NeverFull(),
    FixedStride(2.5, phase=1),
    FixedStride(TABLE, phase=TABLE),
    COSINE,
    CosineThreshold(SHARES, check_every=TABLE),
    LayerCosine(SHARES, check_every=TABLE),
    SentenceBoundary((3, 7, 5), max_age=TABLE),
    MaxAge(RandomRefresh.drawn(0.3, (LAYERS, KV_HEADS), seed=0), 9),
    LOGISTIC,
    LearnedLogistic(("sqrt_age", "query_drift"), (0.3, SHARES), intercept=TABLE),
    MaxAge(COSINE, TABLE),
    BudgetConstrained(AlwaysFull(), SHARES, burst=TABLE),
    BudgetConstrained(MaxAge(LOGISTIC, 5), 1 / 3, burst=1.5),
]
some_examples = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)

HARD = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 3.0, -7.0, 0.1, 1 / 3, 1e300, -1e300, 5e-324, -5e-324, 2.0**53, np.inf, -np.inf]
hard_floats = st.sampled_from([*HARD, np.nan]) | st.floats()


def random_signals(seed: int) -> StepSignals:
    """Of `(rows, layers, kv_heads)`; half of the measured ones on a grid, so that thresholds are met, some NaN."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LAYERS, KV_HEADS)
    step = rng.integers(0, 60, shape).astype(np.float64)
    measured = rng.uniform(-1, 1, (5, *shape))
    measured = np.where(rng.random(measured.shape) < 0.5, np.round(measured * 10) / 10, measured)
    measured[rng.random(measured.shape) < 0.15] = np.nan
    age, n_full = 1 + np.floor(rng.random(shape) ** 3 * step), np.floor(rng.random(shape) * step)
    token = np.where(rng.random(shape) < 0.1, np.nan, rng.integers(0, 12, shape))
    return StepSignals(step, age, n_full, *measured, token)


def run(policy: StepPolicy, signals: StepSignals) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Decision and reasons of the kernel, `(rows, layers, kv_heads)`."""
    written = policy_program(policy)
    program = as_program(written)
    out = np.ones((1 + len(written.reasons), LAYERS, ROWS, KV_HEADS), dtype=bool)
    state = np.stack([getattr(signals, name) for name in SCHEDULE_SIGNALS])
    for layer in range(LAYERS):
        # Refresh signals come from the schedule; what the layer holds there is of the step before.
        of_layer = [np.ascontiguousarray(getattr(signals, name)[:, layer]) for name in QUERY_SIGNALS]
        measured = Signals(*of_layer, *np.full((2, ROWS, KV_HEADS), 0.77))
        run_program(program, layer, 0, 1, state, measured, out)
        run_program(program, layer, 1, ROWS, state, measured, out)
    full, *reasons = np.moveaxis(out, 1, 2)
    return full, dict(zip(written.reasons, reasons, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@some_examples
@given(seed=seeds)
def test_the_kernel_decides_as_the_policy_on_numpy(policy: StepPolicy, seed: int) -> None:
    signals, reasons = random_signals(seed), dict[str, Any]()
    expected = policy.decide(StepSignals(**{name: getattr(signals, name) for name in SIGNALS}, reasons=reasons))
    full, found = run(policy, signals)
    np.testing.assert_array_equal(full, expected)
    np.testing.assert_equal(found, {name: np.broadcast_to(noted, full.shape) for name, noted in reasons.items()})


@dataclass(frozen=True)
class Computes(StepPolicy):
    """Compares the result of an operator on step and age."""

    operator: Callable[[Any, Any], Any]
    other: float | None = None
    kind: ClassVar[str] = "computes"

    def decide(self, signals: StepSignals) -> Any:
        return self.operator(signals.step, signals.age if self.other is None else self.other) >= 0


def result_of(policy: StepPolicy, op: Op, a: float, b: float) -> float:
    """What the kernel has in the register of the instruction `op`."""
    program = as_program(policy_program(policy))
    state, measured = np.zeros((len(SCHEDULE_SIGNALS), 1, 1, 1)), np.zeros((5, 1, 1))
    state[0], state[1] = a, b
    out = np.zeros((1, 1, 1, 1), dtype=bool)
    run_program(program, 0, 0, 1, state, Signals(*measured), out)
    return float(program.registers[np.flatnonzero(program.instructions[:, 0] == op)[0]])


def assert_same_number(found: float, expected: np.ndarray) -> None:
    np.testing.assert_array_equal([found], expected)
    if not np.isnan(found):
        assert np.signbit(found) == np.signbit(expected[0])


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (Op.ADD, operator.add),
        (Op.SUBTRACT, operator.sub),
        (Op.MULTIPLY, operator.mul),
        (Op.DIVIDE, operator.truediv),
        (Op.FLOOR_DIVIDE, operator.floordiv),
        (Op.MODULO, operator.mod),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@settings(max_examples=400, deadline=None)
@given(a=hard_floats, b=hard_floats)
def test_arithmetic_is_that_of_numpy(op: Op, function: Callable[[Any, Any], Any], a: float, b: float) -> None:
    with np.errstate(all="ignore"):
        # Other quotients are in the test below.
        assume(op != Op.FLOOR_DIVIDE or b == 0 or abs(np.float64(a) / b) < 2.0**63)
        assert_same_number(result_of(Computes(function), op, a, b), function(np.array([a]), np.array([b])))
        # A number instead of an array, as parameters are.
        assert_same_number(result_of(Computes(function, b), op, a, 0), function(np.array([a]), b))


@pytest.mark.parametrize(("a", "b"), [(np.nan, 0.5), (0.5, np.nan), (1e300, 0.5), (0.5, 5e-324), (np.inf, 2.0)])
def test_floor_division_has_no_largest_quotient(a: float, b: float) -> None:
    with np.errstate(all="ignore"):
        found = result_of(Computes(operator.floordiv), Op.FLOOR_DIVIDE, a, b)
        assert_same_number(found, np.array([a]) // np.array([b]))


@pytest.mark.parametrize("exponent", [0.5, 2])
@settings(max_examples=400, deadline=None)
@given(a=hard_floats)
def test_roots_and_squares_are_those_of_numpy(exponent: float, a: float) -> None:
    with np.errstate(all="ignore"):
        found = result_of(Computes(operator.pow, exponent), Op.POWER, a, 0)
        assert_same_number(found, np.array([a]) ** exponent)


@pytest.mark.parametrize("exponent", [3, -1, 1.5, 0])
@settings(max_examples=400, deadline=None)
@given(a=hard_floats)
def test_other_powers_are_those_of_numpy_but_for_the_last_bit(exponent: float, a: float) -> None:
    # NumPy has vector code for some processors that rounds otherwise than the C library.
    with np.errstate(all="ignore"):
        found, expected = result_of(Computes(operator.pow, exponent), Op.POWER, a, 0), np.array([a]) ** exponent
    if np.isfinite(expected[0]):
        np.testing.assert_array_max_ulp(np.array([found]), expected, maxulp=1)
    else:
        assert_same_number(found, expected)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (Op.LESS, operator.lt),
        (Op.LESS_EQUAL, operator.le),
        (Op.GREATER, operator.gt),
        (Op.GREATER_EQUAL, operator.ge),
        (Op.EQUAL, operator.eq),
        (Op.NOT_EQUAL, operator.ne),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@settings(max_examples=200, deadline=None)
@given(a=hard_floats, b=hard_floats)
def test_comparisons_are_those_of_numpy(op: Op, function: Callable[[Any, Any], Any], a: float, b: float) -> None:
    policy = Computes(lambda x, y: function(x, y) * 1.0)
    expected = function(np.float64(a), np.float64(b))
    assert result_of(policy, op, a, b) == expected
