"""Products of a few rows with a weight matrix that is read once, at the speed of memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from policies.compiled.kernel import helper
from recycler.decode.cpu.scalars import widen
from recycler.decode.cpu.tile import TILE_BYTES, TILE_ROWS, tile_product

# NumPy's numbers: for Python's numba compiles a function once for each that it is called with.
FIRST_COLUMN = np.int64(0)
ADD, REPLACE = np.bool_(True), np.bool_(False)
# From so many rows on, tiles of sums win over reading each weight row for one sum at a time.
_TILED_ROWS = 6


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
    n_tiled = max(end - begin, 0) // TILE_ROWS * TILE_ROWS if rows >= _TILED_ROWS else 0
    if n_tiled > 0:
        _by_tiles(x, weight, bias, out, column, begin, begin + n_tiled, add)
    for i in range(begin + n_tiled, end):
        for row in range(rows):
            total = zero
            for j in range(inputs):
                total += x[row, j] * widen(weight[i, j])
            _put(out, row, column, i, total, bias, n_biases, add)


@helper(fastmath=True)
def _by_tiles(x: Any, weight: Any, bias: Any, out: Any, column: int, begin: int, end: int, add: bool) -> None:
    """Outputs by `TILE_ROWS`: as many weights are read at once, and multiplied by whole vectors of rows of `x`."""
    rows, inputs = x.shape
    step = TILE_BYTES // x.itemsize
    width = -(-rows // step) * step
    packed, tile = np.zeros((inputs, width), x.dtype), np.empty((TILE_ROWS, width), x.dtype)
    for row in range(rows):
        for j in range(inputs):
            packed[j, row] = x[row, j]
    n_biases = bias.shape[0]
    for i in range(begin, end, TILE_ROWS):
        for first in range(0, width, step):
            tile_product(weight, i * inputs, inputs, 1, packed, first, width, inputs, tile, first, width, REPLACE)
        for row in range(rows):
            for j in range(TILE_ROWS):
                _put(out, row, column, i + j, tile[j, row], bias, n_biases, add)


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
