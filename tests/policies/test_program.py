"""Policies written down: what the instructions say is what `decide` does, and what cannot be written down is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import (
    FEATURES,
    SIGNALS,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    NotAProgram,
    Op,
    PolicyProgram,
    RandomRefresh,
    RefreshKeys,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    known_kinds,
    policy_program,
)
from policies.arrays import where

Make = Callable[..., StepSignals]

TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.0))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
COSINE = CosineThreshold(0.85)
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, 1.5, 0.7, 2, 0.3), intercept=-2.5, threshold=0.3)
EXAMPLES: list[StepPolicy] = [
    AlwaysFull(),
    NeverFull(),
    FixedStride(10),
    FixedStride(2.5, phase=1),
    FixedStride(TABLE, phase=TABLE),
    COSINE,
    CosineThreshold(SHARES, check_every=TABLE),
    LayerCosine(SHARES, check_every=TABLE),
    SentenceBoundary((3, 7, 5), max_age=TABLE),
    RandomRefresh.drawn(0.3, (2, 3), seed=0),
    LOGISTIC,
    LearnedLogistic((), (), intercept=0.1),
    LearnedLogistic(("sqrt_age", "query_drift"), (0.3, SHARES), intercept=TABLE),
    LearnedLogistic(("refresh_loss", "refresh_churn"), (TABLE, SHARES), intercept=SHARES, threshold=0.9),
    MaxAge(COSINE, 20),
    MaxAge(FixedStride(TABLE), TABLE),
    BudgetConstrained(AlwaysFull(), SHARES, burst=TABLE),
    BudgetConstrained(MaxAge(LOGISTIC, 5), 1 / 3, burst=1.5),
    RefreshKeys(BudgetConstrained(COSINE, SHARES), units=((1, 0, 1), (0, 0, 1))),
]


@dataclass(frozen=True)
class Of(StepPolicy):
    """Decides by a function of the signals."""

    function: Callable[[StepSignals], Any]
    kind: ClassVar[str] = "of"

    def decide(self, signals: StepSignals) -> Any:
        return self.function(signals)


EVERY_OPERATOR = [
    Of(lambda s: 2 + s.step - 3 > 1 - s.age),
    Of(lambda s: (2 * s.age) / 3 < 7 / s.age),
    Of(lambda s: (s.step // 3 <= 300 // s.age) & (s.step % 7 >= 11 % s.age)),
    Of(lambda s: (s.age**0.5 != 3) ^ (2**-s.age == 0.5)),
    Of(lambda s: abs(s.query_similarity) >= -s.step_similarity),
    Of(lambda s: ~(s.query_similarity >= 0.5) | (s.refresh_mass > s.per_unit(SHARES))),
    Of(lambda s: True & ((s.age > 3) | np.bool_(False)) ^ False),
    Of(lambda s: where(s.query_similarity >= 0, s.age, s.per_unit(TABLE) * 2) >= np.float64(3)),
    Of(lambda s: where(s.age >= 4, s.step >= 100, s.refresh_mass >= 0.5)),
    Of(lambda s: where(s.age >= 4, s.per_unit(TABLE), 0.5) + (s.step > 3) * 2 >= 4),
]

TRUTHS = {
    Op.LESS: np.less,
    Op.LESS_EQUAL: np.less_equal,
    Op.GREATER: np.greater,
    Op.GREATER_EQUAL: np.greater_equal,
    Op.EQUAL: np.equal,
    Op.NOT_EQUAL: np.not_equal,
    Op.AND: np.logical_and,
    Op.OR: np.logical_or,
    Op.XOR: np.logical_xor,
    Op.NOT: np.logical_not,
}
NUMBERS = {
    Op.ADD: np.add,
    Op.SUBTRACT: np.subtract,
    Op.MULTIPLY: np.multiply,
    Op.DIVIDE: np.divide,
    Op.FLOOR_DIVIDE: np.floor_divide,
    Op.MODULO: np.mod,
    # By the operator, which has short cuts; an exponent is one number or an array.
    Op.POWER: lambda a, b: a ** (float(b.flat[0]) if (b == b.flat[0]).all() else b),
    Op.NEGATIVE: np.negative,
    Op.ABSOLUTE: np.abs,
    Op.WHERE: lambda a, b, c: np.where(a != 0, b, c),
}
N_OPERANDS = {Op.NEGATIVE: 1, Op.ABSOLUTE: 1, Op.NOT: 1, Op.WHERE: 3}


def interpret(program: PolicyProgram, signals: StepSignals) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Decision and reasons over `(traces, layers, kv_heads)`, one instruction after the other."""
    shape = signals.age.shape
    results: list[np.ndarray] = []
    for code, *operands in program.instructions.tolist():
        op = Op(code)
        if op == Op.SIGNAL:
            result = getattr(signals, SIGNALS[operands[0]])
        elif op == Op.CONSTANT:
            result = program.constants[operands[0]]
        elif op == Op.TABLE:
            result = program.tables[operands[0]]
        else:
            used = operands[: N_OPERANDS.get(op, 2)]
            assert max(used) < len(results), "an operand must be a result of an earlier instruction"
            result = (TRUTHS | NUMBERS)[op](*(results[i] for i in used))
        results.append(np.broadcast_to(result, shape).astype(np.float64))
    return results[program.full] != 0, {name: results[i] != 0 for name, i in program.reasons.items()}


@pytest.mark.parametrize("kind", known_kinds())
def test_every_kind_has_an_example(kind: str) -> None:
    assert kind in {policy.kind for policy in EXAMPLES}, f"policy kind {kind!r} has no example in {__file__}: add one."


@pytest.mark.parametrize("policy", [*EXAMPLES, *EVERY_OPERATOR], ids=lambda policy: policy.kind)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_program_decides_as_its_policy_and_for_the_same_reasons(
    policy: StepPolicy, random_signals: Make, seed: int
) -> None:
    signals, reasons = random_signals(seed, missing=0.2), dict[str, Any]()
    expected = policy.decide(StepSignals(**{name: getattr(signals, name) for name in SIGNALS}, reasons=reasons))
    full, found = interpret(policy_program(policy), signals)
    np.testing.assert_array_equal(full, expected)
    np.testing.assert_equal(found, {name: np.broadcast_to(noted, full.shape) for name, noted in reasons.items()})


def test_together_the_examples_use_every_instruction() -> None:
    programs = [policy_program(policy) for policy in [*EXAMPLES, *EVERY_OPERATOR]]
    assert {int(code) for program in programs for code in program.instructions[:, 0]} == set(map(int, Op))


def test_what_is_computed_twice_is_written_down_once() -> None:
    program = policy_program(Of(lambda s: (s.age * s.step > 3) | (s.age * s.step < 1)))
    assert (program.instructions[:, 0] == Op.MULTIPLY).sum() == 1


def item_assigned(signals: StepSignals) -> Any:
    full = signals.age > 3
    full[0] = True
    return full


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda s: s.step > 0 if s.age > 3 else s.step > 1, "asks whether a condition holds"),
        (lambda s: (s.age > 3) and (s.step > 1), "asks whether a condition holds"),
        (lambda s: 1 < s.age < 3, "asks whether a condition holds"),
        (lambda s: np.log(s.age) > 1, "ufuncs"),
        (lambda s: np.where(s.age > 3, s.step, 1) > 2, "whether a condition holds"),
        (lambda s: np.maximum(s.age, 3) > 2, "ufuncs"),
        (lambda s: s.age.clip(3) > 3, "clip"),
        (lambda s: s.age + np.ones(3) > 3, "ndarray"),
        (lambda s: s.age > "3", "a str among signals"),
        (lambda s: s.age[0] > 3, "subscriptable"),
        (item_assigned, "item assignment"),
        (lambda s: (s.age > 3) if s.layer == 1 else (s.age > 5), "asks for the layer"),
        (lambda s: s.age > TABLE[s.layer][0], "asks for the layer"),
        (lambda s: s.age > {0: 3}[s.layer], "unhashable"),
        (lambda s: s.age + 1, "not a condition"),
        (lambda s: True, "decide gave a bool"),
        (lambda s: s.age & s.step, "and of numbers"),
        (lambda s: (s.age > 3) & s.step, "and of numbers"),
        (lambda s: (s.age > 3) | 1, "or of numbers"),
        (lambda s: ~s.age, "not of numbers"),
        (lambda s: (s.age > 3) + (s.step > 3) > 1, "add of conditions"),
        (lambda s: (s.age > 3) - True > 1, "subtract of conditions"),
        (lambda s: -(s.age > 3) > 1, "negative of conditions"),
        (lambda s: (s.per_unit(TABLE) > 1) & (s.per_unit(((1.0, 2.0),)) > 1), "its tables have the shapes"),
        (lambda s: s.per_unit((1.0, 2.0, 3.0)) > 1, "its tables have the shapes"),
    ],
)
def test_what_is_no_program_is_refused_with_what_it_does(function: Callable[[StepSignals], Any], why: str) -> None:
    with pytest.raises(NotAProgram, match=why):
        policy_program(Of(function))


def test_asking_whether_it_is_the_first_layer_is_asking_for_the_layer() -> None:
    with pytest.raises(NotAProgram, match="asks for the layer"):
        policy_program(Of(lambda s: s.age > 3 if s.layer else s.age > 5))


def test_a_reason_that_is_no_condition_is_refused() -> None:
    def decide(signals: StepSignals) -> Any:
        signals.because("budget", signals.age)
        return signals.age > 3

    with pytest.raises(NotAProgram, match="not a condition"):
        policy_program(Of(decide))
