"""A tile's sums are the product's, in every type, wherever it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recycler.decode.cpu.compiled import kernel
from recycler.decode.cpu.tile import TILE_ROWS, padded, tile_columns, tile_product


@kernel()
def _multiply(a: Any, begin: int, row: int, step: int, b: Any, column: int, n: int, c: Any, add: bool) -> None:
    width = b.shape[1]
    tile_product(a, begin, row, step, b, column, width, n, c, column, width, add)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    kind=st.sampled_from(["float32", "float64", "bfloat16"]),
    n=st.integers(0, 20),
    first=st.integers(0, 3),
    tile=st.integers(0, 2),
    add=st.booleans(),
    turned=st.booleans(),
)
def test_a_tile_is_the_product_of_its_rows_and_columns(
    seed: int, kind: str, n: int, first: int, tile: int, add: bool, turned: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    of_a = torch.randn(int(TILE_ROWS) + 3, 20, generator=random, dtype=torch.float64).to(getattr(torch, kind))
    stored = of_a.view(torch.uint16) if kind == "bfloat16" else of_a
    dtype = np.float64 if kind == "float64" else np.float32
    columns = tile_columns(dtype)
    b, c = (
        torch.randn(rows, 3 * columns, generator=random, dtype=torch.float64).numpy().astype(dtype) for rows in (20, 6)
    )
    before = c.copy()
    # Rows of numbers, or, turned, columns.
    of_rows = np.ascontiguousarray(stored.numpy().T if turned else stored.numpy())
    width = of_rows.shape[1]
    begin, row, step = (first, 1, width) if turned else (first * width, width, 1)
    _multiply(of_rows, begin, row, step, b, tile * columns, n, c, add)
    rows, some = of_a[first : first + int(TILE_ROWS), :n].double().numpy(), slice(tile * columns, (tile + 1) * columns)
    expected = before.copy()
    expected[:, some] = rows @ b[:n, some].astype(np.float64) + add * before[:, some]
    np.testing.assert_allclose(c, expected, rtol=0, atol=1e-12 if kind == "float64" else 2e-5)


@pytest.mark.parametrize(("n", "multiple", "expected"), [(0, 6, 0), (1, 6, 6), (6, 6, 6), (7, 6, 12)])
def test_padding_is_to_the_next_multiple(n: int, multiple: int, expected: int) -> None:
    assert padded(n, multiple) == expected
