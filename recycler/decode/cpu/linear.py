"""Products of a few rows with a weight matrix that is read once, at the speed of memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.compiled.kernel import helper
from recycler.decode.cpu.scalars import widen

# NumPy's numbers: for Python's numba compiles a function once for each that it is called with.
FIRST_COLUMN = np.int64(0)
ADD, REPLACE = np.bool_(True), np.bool_(False)
# From so many rows on, blocks of 4 x 4 sums win over reading each weight row for one sum at a time.
_BLOCKED_ROWS = 6


@helper(fastmath=True)
def linear(x: Any, weight: Any, bias: Any, out: Any, column: int, begin: int, end: int, add: bool) -> None:
    """Outputs `begin` to `end` of a linear layer: `out[:, column + i] = x @ weight[i] + bias[i]`.

    Args:
        x: Float `(rows, inputs)`.
        weight: `(outputs, inputs)` as stored.
        bias: `(outputs,)` as stored, or empty for none.
        out: Float `(rows, at least column + end)`.
        column: Where output 0 goes.
        begin: First output.
        end: One past the last output.
        add: Whether to add to what is there.
    """
    rows, inputs = x.shape
    zero = x.dtype.type(0)
    n_biases = bias.shape[0]
    n_blocked = max(end - begin, 0) // 4 * 4 if rows >= _BLOCKED_ROWS else 0
    for i in range(begin, begin + n_blocked, 4):
        for row in range(0, rows - 3, 4):
            _block(x, weight, bias, out, column, i, row, add)
        for row in range(rows - rows % 4, rows):
            a, b, c, d = zero, zero, zero, zero
            for j in range(inputs):
                v = x[row, j]
                a += v * widen(weight[i, j])
                b += v * widen(weight[i + 1, j])
                c += v * widen(weight[i + 2, j])
                d += v * widen(weight[i + 3, j])
            _put(out, row, column, i, a, bias, n_biases, add)
            _put(out, row, column, i + 1, b, bias, n_biases, add)
            _put(out, row, column, i + 2, c, bias, n_biases, add)
            _put(out, row, column, i + 3, d, bias, n_biases, add)
    for i in range(begin + n_blocked, end):
        for row in range(rows):
            total = zero
            for j in range(inputs):
                total += x[row, j] * widen(weight[i, j])
            _put(out, row, column, i, total, bias, n_biases, add)


@helper(fastmath=True)
def _block(x: Any, weight: Any, bias: Any, out: Any, column: int, i: int, row: int, add: bool) -> None:
    """Four outputs of four rows: sixteen sums fill the registers, and every number loaded is used four times."""
    zero = x.dtype.type(0)
    n_biases = bias.shape[0]
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    d0, d1, d2, d3 = zero, zero, zero, zero
    for j in range(x.shape[1]):
        x0, x1, x2, x3 = x[row, j], x[row + 1, j], x[row + 2, j], x[row + 3, j]
        v = widen(weight[i, j])
        a0 += v * x0
        a1 += v * x1
        a2 += v * x2
        a3 += v * x3
        v = widen(weight[i + 1, j])
        b0 += v * x0
        b1 += v * x1
        b2 += v * x2
        b3 += v * x3
        v = widen(weight[i + 2, j])
        c0 += v * x0
        c1 += v * x1
        c2 += v * x2
        c3 += v * x3
        v = widen(weight[i + 3, j])
        d0 += v * x0
        d1 += v * x1
        d2 += v * x2
        d3 += v * x3
    _put_four(out, row, column, i, a0, a1, a2, a3, bias, n_biases, add)
    _put_four(out, row, column, i + 1, b0, b1, b2, b3, bias, n_biases, add)
    _put_four(out, row, column, i + 2, c0, c1, c2, c3, bias, n_biases, add)
    _put_four(out, row, column, i + 3, d0, d1, d2, d3, bias, n_biases, add)


@helper(fastmath=True)
def _put_four(
    out: Any, row: int, column: int, i: int, a: Any, b: Any, c: Any, d: Any, bias: Any, n_biases: int, add: bool
) -> None:
    _put(out, row, column, i, a, bias, n_biases, add)
    _put(out, row + 1, column, i, b, bias, n_biases, add)
    _put(out, row + 2, column, i, c, bias, n_biases, add)
    _put(out, row + 3, column, i, d, bias, n_biases, add)


@helper(fastmath=True)
def _put(out: Any, row: int, column: int, i: int, total: Any, bias: Any, n_biases: int, add: bool) -> None:
    if n_biases > 0:
        total += widen(bias[i])
    if add:
        total += out[row, column + i]
    out[row, column + i] = total


@helper(fastmath=True)
def rms_norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Root-mean-square norm of each row (arXiv 1910.07467); `weight` is as stored."""
    rows, width = x.shape
    for row in range(rows):
        total = x.dtype.type(0)
        for j in range(width):
            total += x[row, j] * x[row, j]
        factor = x.dtype.type(1 / (total / width + eps) ** 0.5)
        for j in range(width):
            out[row, j] = x[row, j] * factor * widen(weight[j])
