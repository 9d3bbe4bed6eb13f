"""Policies inside a kernel: what NumPy decides, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
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
    RandomRefresh,
    RefreshKeys,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
    known_kinds,
    policy_program,
)
from recycler.decode.cuda.program import DeviceProgram, _floor_divide, kernel_code, run_program

LAYERS, KV_HEADS, ROWS = 2, 3, 4
TABLE = ((1.0, 2.0, 3.5), (10.0, 5.0, 7.3))
SHARES = ((0.1, 0.5, 1 / 3), (0.0, 1.0, 0.07))
LOGISTIC = LearnedLogistic(tuple(FEATURES), (0.02, 0.1, -0.5, 1.5, 0.7, 2, 0.3), intercept=-2.5, threshold=0.3)
EXAMPLES: dict[str, list[StepPolicy]] = {
    "always_full": [AlwaysFull()],
    "never_full": [NeverFull()],
    "fixed_stride": [FixedStride(3), FixedStride(2.5, 1), FixedStride(TABLE, SHARES), FixedStride(1.1)],
    "random_refresh": [RandomRefresh.drawn(0.3, (LAYERS, KV_HEADS), 0)],
    "cosine_threshold": [CosineThreshold(0.3, 2.5), CosineThreshold(SHARES, TABLE)],
    "layer_cosine": [LayerCosine(0.3)],
    "learned_logistic": [LOGISTIC],
    "sentence_boundary": [SentenceBoundary((5, 7), TABLE)],
    "max_age": [MaxAge(NeverFull(), TABLE), MaxAge(LOGISTIC, 9)],
    "budget_constrained": [
        BudgetConstrained(MaxAge(LOGISTIC, TABLE), SHARES, 1),
        BudgetConstrained(AlwaysFull(), 1 / 49),
    ],
    "refresh_keys": [RefreshKeys(BudgetConstrained(LOGISTIC, SHARES))],
}


@triton.jit
def _decide(signals, constants, tables, out, n, N_HEADS: tl.constexpr, CODE: tl.constexpr, RESULTS: tl.constexpr):
    unit = tl.program_id(0)
    registers = run_program(signals + unit, constants, tables + unit % N_HEADS, n, n, CODE)
    for i in tl.static_range(len(RESULTS)):
        tl.store(out + i * n + unit, registers[RESULTS[i]] != 0)


def some_signals(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Signals of `(rows, layers, kv_heads)`, some of them unmeasured."""
    shape = (ROWS, LAYERS, KV_HEADS)
    signals = {name: rng.uniform(-1, 1, shape) for name in SIGNALS}
    signals["step"] = np.broadcast_to(rng.integers(0, 200, (ROWS, 1, 1)), shape).astype(float)
    signals["age"] = rng.integers(1, 20, shape).astype(float)
    signals["n_full"] = rng.integers(0, 40, shape).astype(float)
    signals["token"] = np.broadcast_to(rng.integers(4, 9, (ROWS, 1, 1)), shape).astype(float)
    for name in ("query_similarity", "refresh_mass", "refresh_overlap", "token"):
        signals[name] = np.where(rng.random(shape) < 0.15, np.nan, signals[name])
    return signals


def in_kernel(policy: StepPolicy, signals: dict[str, np.ndarray], layer: int, device: torch.device) -> list[np.ndarray]:
    """The decision and the reasons for a layer, bool `(rows, kv_heads)`."""
    program = DeviceProgram([policy_program(policy)], (LAYERS, KV_HEADS), device)
    results = (program.full, *program.reasons.values())
    stacked = torch.from_numpy(np.stack([signals[name][:, layer] for name in SIGNALS])).to(device)
    out = torch.zeros((len(results), ROWS, KV_HEADS), dtype=torch.int8, device=device)
    # Tables of a layer lie `layers * kv_heads` apart, signals `rows * kv_heads`: here both are spread alike.
    n = ROWS * KV_HEADS
    tables = torch.zeros((program.tables.shape[1], n), dtype=torch.float64, device=device)
    tables[:, :KV_HEADS] = program.tables[0, :, layer]
    _decide[(n,)](stacked, program.constants, tables, out, n, KV_HEADS, program.code, results, enable_fp_fusion=False)
    return list((out != 0).cpu().numpy())


def test_every_kind_has_an_example() -> None:
    assert set(EXAMPLES) >= set(known_kinds())


@pytest.mark.parametrize(
    "policy", [policy for of_kind in EXAMPLES.values() for policy in of_kind], ids=lambda policy: policy.kind
)
def test_a_kernel_decides_as_numpy_does(policy: StepPolicy, device: torch.device) -> None:
    signals = some_signals(np.random.default_rng(1))
    for layer in range(LAYERS):
        noted: dict[str, np.ndarray] = {}
        of_layer = {name: values[:, layer] for name, values in signals.items()}
        full = policy.decide(StepSignals(**of_layer, layer=layer, reasons=noted))
        decided, *reasons = in_kernel(policy, signals, layer, device)
        np.testing.assert_array_equal(decided, full)
        assert len(reasons) == len(noted)
        for found, expected in zip(reasons, noted.values(), strict=True):
            np.testing.assert_array_equal(found, np.broadcast_to(expected, full.shape))


@triton.jit
def _divide(a, b, quotient, remainder):
    i = tl.program_id(0)
    q, r = _floor_divide(tl.load(a + i), tl.load(b + i))
    tl.store(quotient + i, q)
    tl.store(remainder + i, r)


def divided(a: np.ndarray, b: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    pair = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (a, b)]
    quotient, remainder = torch.zeros_like(pair[0]), torch.zeros_like(pair[0])
    _divide[(len(a),)](*pair, quotient, remainder, enable_fp_fusion=False)
    return quotient.cpu().numpy(), remainder.cpu().numpy()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(-5000, 5000).map(float), st.floats(-1e6, 1e6)),
            st.one_of(st.integers(1, 300).map(lambda n: n / 10), st.floats(1e-3, 1e3), st.floats(-1e3, -1e-3)),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_floor_division_and_modulo_are_those_of_numpy(device: torch.device, pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    quotient, remainder = divided(a, b, device)
    np.testing.assert_array_equal(quotient, a // b)
    np.testing.assert_array_equal(remainder, a % b)


def test_multiples_of_strides_that_are_no_binary_fractions_divide_as_in_numpy(device: torch.device) -> None:
    n, stride = (x.ravel() for x in np.meshgrid(np.arange(0, 330, 11.0), np.arange(11, 41) / 10))
    quotient, remainder = divided(n, stride, device)
    np.testing.assert_array_equal(quotient, n // stride)
    np.testing.assert_array_equal(remainder, n % stride)
    # The rounded quotient alone would be wrong somewhere here.
    assert (np.floor(n / stride) != n // stride).any()


def test_division_by_zero_is_that_of_numpy(device: torch.device) -> None:
    a = np.array([1.0, -1.0, 0.0])
    with np.errstate(all="ignore"):
        quotient, remainder = divided(a, np.zeros(3), device)
    np.testing.assert_array_equal(quotient, [np.inf, -np.inf, np.nan])
    assert np.isnan(remainder).all()


def test_infinite_and_huge_divisors_divide_as_in_numpy(device: torch.device) -> None:
    a, b = np.array([3.0, -3.0, 0.0, 7.0, -7.0]), np.array([np.inf, np.inf, np.inf, 1e305, 1e305])
    with np.errstate(all="ignore"):
        quotient, remainder = divided(a, b, device)
        np.testing.assert_array_equal(quotient, a // b)
        np.testing.assert_array_equal(remainder, a % b)


@dataclass(frozen=True)
class Powers(StepPolicy):
    """A decision by a power of the age."""

    power: float
    kind: ClassVar[str] = "powers"

    def decide(self, signals: StepSignals) -> Any:
        return signals.age**self.power >= 3


@pytest.mark.parametrize("power", [0.5, 2, -1])
def test_kernels_take_the_usual_powers(power: float, device: torch.device) -> None:
    signals = some_signals(np.random.default_rng(2))
    (decided,) = in_kernel(Powers(power), signals, 0, device)
    np.testing.assert_array_equal(decided, signals["age"][:, 0] ** power >= 3)


def test_other_powers_are_no_program_for_a_kernel() -> None:
    with pytest.raises(NotAProgram, match=r"^kernels take the powers 0\.5, 2 and -1, not 1\.5$"):
        kernel_code(policy_program(Powers(1.5)))


def test_policies_of_one_form_share_their_code() -> None:
    one, other = (
        policy_program(BudgetConstrained(CosineThreshold(t), budget)) for t, budget in ((0.5, 0.1), (0.9, SHARES))
    )
    assert kernel_code(one) != kernel_code(other)
    assert kernel_code(policy_program(BudgetConstrained(CosineThreshold(0.9), 0.3))) == kernel_code(one)
