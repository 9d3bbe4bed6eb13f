from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import FixedStride

FullSteps = Callable[..., list[int]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (FixedStride(10), [9, 19, 29]),
        (FixedStride(10, phase=3), [6, 16, 26]),
        (FixedStride(10, phase=9), [0, 10, 20]),
        (FixedStride(10, phase=10), [9, 19, 29]),
        (FixedStride(10, phase=23), [6, 16, 26]),
        (FixedStride(10, phase=0.5), [9, 19, 29]),
        (FixedStride(1), list(range(30))),
        (FixedStride(30), [29]),
        (FixedStride(31), []),
    ],
)
def test_a_stride_counts_from_the_end_of_prefill_and_a_phase_puts_it_ahead(
    full_steps: FullSteps, policy: FixedStride, expected: list[int]
) -> None:
    assert full_steps(policy, 30) == expected


def test_a_stride_of_two_and_a_half_alternates_gaps_of_three_and_two(full_steps: FullSteps) -> None:
    assert full_steps(FixedStride(2.5), 15) == [2, 4, 7, 9, 12, 14]


def test_every_unit_has_its_own_clock(drive: Callable[..., np.ndarray]) -> None:
    full = drive(FixedStride(((2, 3), (4, 4)), phase=((0, 0), (0, 2))), 8, zeros=np.zeros((1, 2, 2)))[:, 0]
    steps = [[np.flatnonzero(full[:, layer, head]).tolist() for head in range(2)] for layer in range(2)]
    assert steps == [[[1, 3, 5, 7], [2, 5]], [[3, 7], [1, 5]]]


@settings(max_examples=50, deadline=None)
@given(stride=st.one_of(st.floats(1, 50), st.integers(1, 50), st.sampled_from([1.1, 10 / 3, 1 + 2**-52])))
def test_at_every_prefix_exactly_the_whole_strides_so_far_ran_full(full_steps: FullSteps, stride: float) -> None:
    steps = full_steps(FixedStride(stride), 120)
    counts = accumulate(int(step in steps) for step in range(120))
    # Exactly: Fraction divides the float as it is, and no step more may run full.
    assert list(counts) == [n // Fraction(stride) for n in range(1, 121)]


@settings(max_examples=50, deadline=None)
@given(stride=st.floats(1, 50), phase=st.floats(0, 200))
def test_a_phase_brings_at_most_one_full_step_more_at_any_prefix(
    full_steps: FullSteps, stride: float, phase: float
) -> None:
    for count, step in enumerate(full_steps(FixedStride(stride, phase), 120), start=1):
        assert count <= (step + 1) / stride + 1 + 1e-9  # step + phase is rounded.


@pytest.mark.parametrize("stride", [0, 0.99, -3, float("nan"), float("inf")])
def test_a_stride_below_one_step_is_refused(stride: float) -> None:
    with pytest.raises(ValueError, match=r"stride must be at least 1, not "):
        FixedStride(stride)


def test_a_negative_phase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"phase must be at least 0, not -1\."):
        FixedStride(10, phase=-1)
