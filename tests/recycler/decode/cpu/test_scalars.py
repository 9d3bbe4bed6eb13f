"""Numbers inside the kernels: bfloat16 is that of torch, and the exponential is as good as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from recycler.decode.cpu.scalars import bits_of, exp, float_of, narrow, widen


@njit
def _widen_all(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = widen(values[i])


@njit
def _narrow_all(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = narrow(values[i], out[0])


@njit
def _exp_all(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = exp(values[i])


@njit
def _there_and_back(values: Any, bits: Any, out: Any) -> None:
    for i in range(values.size):
        bits[i] = bits_of(values[i])
        out[i] = float_of(bits[i])


def filled(function: Callable[[np.ndarray, np.ndarray], None], values: np.ndarray, dtype: type) -> np.ndarray:
    out = np.zeros(values.shape, dtype)
    function(values, out)
    return out


def torch_bfloat16(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return found


ALL_PATTERNS = np.arange(2**16).astype(np.uint16)


def test_every_bfloat16_widens_to_what_torch_widens_it_to() -> None:
    found = filled(_widen_all, ALL_PATTERNS, np.float32)
    expected = torch.from_numpy(ALL_PATTERNS).view(torch.bfloat16).float().numpy()
    # Bit for bit, NaN too.
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_every_bfloat16_comes_back_narrowed() -> None:
    wide = filled(_widen_all, ALL_PATTERNS, np.float32)
    back, numbers = filled(_narrow_all, wide, np.uint16), ~np.isnan(wide)
    np.testing.assert_array_equal(back[numbers], ALL_PATTERNS[numbers])
    # One NaN stands for all of them.
    assert np.isnan(filled(_widen_all, back[~numbers], np.float32)).all()


def test_floats_narrow_as_in_torch_with_ties_to_even() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 10**6, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000
    infinite = np.array([np.inf, -np.inf], np.float32).view(np.uint32)
    values = np.concatenate([words, ties, ties - 1, ties + 1, infinite]).astype(np.uint32).view(np.float32)
    numbers = values[~np.isnan(values)]
    np.testing.assert_array_equal(filled(_narrow_all, numbers, np.uint16), torch_bfloat16(numbers))
    others = values[np.isnan(values)]
    assert np.isnan(filled(_widen_all, filled(_narrow_all, others, np.uint16), np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_numbers_stay_what_they_are(dtype: type) -> None:
    values = np.array([0.1, -0.0, np.inf, -3e38, 1e-42], dtype=dtype)
    np.testing.assert_array_equal(filled(_widen_all, values, dtype), values)
    np.testing.assert_array_equal(filled(_narrow_all, values, dtype), values)


def test_bits_sort_as_the_numbers_do() -> None:
    values = np.sort(np.concatenate([np.geomspace(1e-45, 3e38, 999), [0, np.inf]]).astype(np.float32))
    bits, back = np.zeros(values.shape, np.int32), np.zeros_like(values)
    _there_and_back(values, bits, back)
    np.testing.assert_array_equal(back, values)
    np.testing.assert_array_equal(bits, values.view(np.int32))
    assert (np.diff(bits) >= 0).all()


class TestExponential:
    def test_its_relative_error_in_float32_is_below_4e_7(self) -> None:
        x = np.concatenate([np.linspace(-87, 0, 10**6), -np.geomspace(1e-30, 87, 10**5)]).astype(np.float32)
        expected = np.exp(x.astype(np.float64))
        assert (np.abs(filled(_exp_all, x, np.float32) / expected - 1)).max() <= 4e-7

    def test_it_never_falls_when_its_argument_rises_by_more_than_rounding(self) -> None:
        found = filled(_exp_all, np.linspace(-87, 0, 10**5).astype(np.float32), np.float32)
        assert (np.diff(found) > 0).all()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_it_is_exactly_1_at_0(self, dtype: type) -> None:
        assert filled(_exp_all, np.array([0.0, -0.0], dtype), dtype).tolist() == [1, 1]

    def test_far_below_it_is_next_to_nothing_and_no_other_number(self) -> None:
        found = filled(_exp_all, np.array([-87.5, -1e4, -1e30, -3e38, -np.inf], np.float32), np.float32)
        assert (found >= 0).all()
        assert (found < 2e-38).all()

    def test_in_float64_it_is_that_of_numpy_but_for_the_last_bit(self) -> None:
        x = np.linspace(-700, 0, 10**5)
        np.testing.assert_array_max_ulp(filled(_exp_all, x, np.float64), np.exp(x), maxulp=1)
