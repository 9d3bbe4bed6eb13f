"""Products with weights and root-mean-square norms are those of float64, up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from recycler.decode.cpu import linear as helpers

STORED = ["float32", "float64", "bfloat16"]
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-23, "float64": 2.0**-52}


def in_kernel(helper: Any) -> Any:
    """A kernel that calls the helper: Python has no way into it."""
    return njit(lambda *arguments: helper(*arguments))


linear, rms_norm = map(in_kernel, (helpers.linear, helpers.rms_norm))


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as a model keeps them; bfloat16 is cut off, for any of its patterns will do."""
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def widened(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def computed(kind: str) -> str:
    return "float64" if kind == "float64" else "float32"


@pytest.mark.parametrize("kind", STORED)
@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 13),
    inputs=st.sampled_from([1, 7, 32, 75]),
    outputs=st.integers(1, 30),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    column=st.sampled_from([0, 5]),
    has_bias=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_part_of_the_outputs_is_computed_and_no_other_is_touched(
    kind: str,
    rows: int,
    inputs: int,
    outputs: int,
    cut: tuple[float, float],
    column: int,
    has_bias: bool,
    add: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)).astype(computed(kind))
    weight = stored(rng.standard_normal((outputs, inputs)), kind)
    bias = stored(rng.standard_normal(outputs if has_bias else 0), kind)
    before = rng.standard_normal((rows, column + outputs + 2)).astype(computed(kind))
    begin, end = sorted(int(share * (outputs + 1)) for share in cut)
    end = min(end, outputs)
    out = before.copy()
    linear(x, weight, bias, out, column, begin, end, add)
    wide, x = widened(weight), x.astype(np.float64)
    # The worst that sums in any order can do: each of the terms is rounded about as often as there are terms.
    bound = np.abs(x) @ np.abs(wide).T
    expected = x @ wide.T
    if has_bias:
        expected += widened(bias)
        bound += np.abs(widened(bias))
    part = slice(column + begin, column + end)
    if add:
        expected += before[:, column : column + outputs]
        bound += np.abs(before[:, column : column + outputs])
    error = np.abs(out[:, part] - expected[:, begin:end])
    assert (error <= EPSILON[kind] * (4 + inputs / 4) * bound[:, begin:end]).all()
    untouched = np.ones(out.shape[1], dtype=bool)
    untouched[part] = False
    np.testing.assert_array_equal(out[:, untouched], before[:, untouched])


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("width", [1, 8, 75])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_norm_is_that_of_each_row(kind: str, width: int, size: float) -> None:
    rng = np.random.default_rng(width)
    x = (size * rng.standard_normal((5, width))).astype(computed(kind))
    weight = stored(rng.uniform(0.5, 2, width), kind)
    out = np.empty_like(x)
    rms_norm(x, weight, 1e-5, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * widened(weight)
    np.testing.assert_allclose(out, expected, rtol=8 * EPSILON[kind], atol=0)


@pytest.mark.parametrize("kind", STORED)
def test_the_norm_of_nothing_is_nothing(kind: str) -> None:
    x = np.zeros((2, 8), dtype=computed(kind))
    out = np.ones_like(x)
    rms_norm(x, stored(np.ones(8), kind), 1e-6, out)
    np.testing.assert_array_equal(out, x)
