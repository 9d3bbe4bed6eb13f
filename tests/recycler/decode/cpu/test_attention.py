"""Attention in parts, brought together, is the softmax attention of textbooks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from recycler.decode.cpu import attention as helpers
from recycler.decode.cpu.attention import BLOCK_TOKENS, NOTHING

STORED = ["float32", "float64", "bfloat16"]
TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-6, "float64": 1e-14}


def in_kernel(helper: Any) -> Any:
    """A kernel that calls the helper: Python has no way into it."""
    return njit(lambda *arguments: helper(*arguments))


attend_tokens, merge = map(in_kernel, (helpers.attend_tokens, helpers.merge))


class Result(NamedTuple):
    attention: np.ndarray
    normaliser: np.ndarray
    logits: np.ndarray


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as a cache keeps them; bfloat16 is cut off, for any of its patterns will do."""
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def widened(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def expected(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float) -> Result:
    """In float64."""
    logits = query.astype(np.float64) @ widened(keys).T * scaling
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    return Result(weights / total @ widened(values), (top + np.log(total))[:, 0], logits)


def in_parts(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scaling: float,
    cuts: list[int],
    *,
    first_logit: int = 0,
    keep_logits: bool = True,
) -> Result:
    """By the kernels, one part between each two cuts."""
    group, head_dim = query.shape
    parts, dtype = len(cuts) - 1, query.dtype
    highest, total = np.full((parts, group), NOTHING, dtype), np.zeros((parts, group), dtype)
    output, block = np.zeros((parts, group, head_dim), dtype), np.full((group, BLOCK_TOKENS), np.nan, dtype)
    logits = np.full((group, first_logit + len(keys) + 2), np.inf, dtype)
    for part, (begin, end) in enumerate(pairwise(cuts)):
        state = highest[part], total[part], output[part]
        attend_tokens(
            query, keys, values, begin, end, scaling, 0.0, block, *state, logits, first_logit, keep_logits, True
        )
    attention, normaliser = np.empty((group, head_dim), dtype), np.empty(group, dtype)
    merge(highest, total, output, attention, normaliser, True)
    return Result(attention, normaliser, logits)


def random_unit(seed: int, kind: str, n: int, group: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((group, head_dim)).astype("float64" if kind == "float64" else "float32")
    keys, values = rng.standard_normal((2, n, head_dim))
    return query, stored(2 * keys, kind), stored(values, kind)


@pytest.mark.parametrize("kind", STORED)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5 * BLOCK_TOKENS),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([8, 64, 80, 128]),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    first_logit=st.sampled_from([0, 7]),
)
def test_parts_together_are_the_attention(
    kind: str, seed: int, n: int, group: int, head_dim: int, cuts: list[float], first_logit: int
) -> None:
    query, keys, values = random_unit(seed, kind, n, group, head_dim)
    scaling = head_dim**-0.5
    # Equal cuts make empty parts.
    places = [0, *sorted(int(cut * n) for cut in cuts), n]
    found = in_parts(query, keys, values, scaling, places, first_logit=first_logit)
    right = expected(query, keys, values, scaling)
    atol = TOLERANCE[kind]
    np.testing.assert_allclose(found.attention, right.attention, rtol=0, atol=2 * atol)
    np.testing.assert_allclose(found.normaliser, right.normaliser, rtol=0, atol=atol)
    np.testing.assert_allclose(found.logits[:, first_logit : first_logit + n], right.logits, rtol=0, atol=atol)
    assert np.isinf(found.logits[:, :first_logit]).all()
    assert np.isinf(found.logits[:, first_logit + n :]).all()


@pytest.mark.parametrize("kind", STORED)
def test_one_part_may_come_piece_by_piece(kind: str) -> None:
    # A unit goes on from the prompt's part of a cache to the row's own.
    query, keys, values = random_unit(3, kind, 75, 3, 64)
    dtype = query.dtype
    highest, total = np.full(3, NOTHING, dtype), np.zeros(3, dtype)
    output, block, logits = np.zeros((3, 64), dtype), np.zeros((3, BLOCK_TOKENS), dtype), np.zeros((3, 75), dtype)
    for low, high in ((0, 0), (0, 41), (41, 75)):
        attend_tokens(
            query,
            keys[low:high],
            values[low:high],
            0,
            high - low,
            0.1,
            0.0,
            block,
            highest,
            total,
            output,
            logits,
            low,
            True,
            True,
        )
    attention, normaliser = np.empty((3, 64), dtype), np.empty(3, dtype)
    merge(highest[None], total[None], output[None], attention, normaliser, True)
    right = expected(query, keys, values, 0.1)
    atol = TOLERANCE[kind]
    np.testing.assert_allclose(attention, right.attention, rtol=0, atol=atol)
    np.testing.assert_allclose(normaliser, right.normaliser, rtol=0, atol=atol)
    np.testing.assert_allclose(logits, right.logits, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("heights", [(-1e4, 0, 1e4), (1e4, 0, -1e4), (-1e4, -1e4, -1e4), (3e4, 3e4, 2e4)], ids=str)
def test_logits_far_apart_neither_overflow_nor_lose_the_highest(kind: str, heights: tuple[float, ...]) -> None:
    # Logits are exact: what is measured is the softmax, not a sum of large products.
    n = 70
    query, keys, values = random_unit(1, kind, n, 2, 8)
    query[:] = 0
    query[:, 0] = 1
    steps = np.repeat(heights, [n // 2, n // 4, n - n // 2 - n // 4])
    keys[:, 0] = stored(steps, kind)
    found, right = in_parts(query, keys, values, 1, [0, 13, 13, 50, n]), expected(query, keys, values, 1)
    np.testing.assert_array_equal(found.logits[:, :n], right.logits)
    np.testing.assert_allclose(found.attention, right.attention, rtol=0, atol=TOLERANCE[kind])
    np.testing.assert_allclose(found.normaliser, right.normaliser, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", STORED)
def test_logits_are_kept_only_where_asked_for(kind: str) -> None:
    query, keys, values = random_unit(2, kind, 40, 2, 8)
    kept = in_parts(query, keys, values, 0.3, [0, 40])
    found = in_parts(query, keys, values, 0.3, [0, 40], keep_logits=False)
    assert np.isinf(found.logits).all()
    np.testing.assert_array_equal(found.attention, kept.attention)


@pytest.mark.parametrize("kind", STORED)
def test_a_single_token_is_given_back(kind: str) -> None:
    query, keys, values = random_unit(4, kind, 9, 3, 80)
    found = in_parts(query, keys, values, 0.1, [5, 5, 6, 6])
    np.testing.assert_array_equal(found.attention, np.broadcast_to(widened(values)[5], (3, 80)))
    assert np.isinf(np.delete(found.logits, 5, axis=1)).all()


@pytest.mark.parametrize("kind", STORED)
def test_without_values_logits_and_their_sum_are_the_same(kind: str) -> None:
    query, keys, values = random_unit(5, kind, 75, 3, 64)
    whole = in_parts(query, keys, values, 0.3, [0, 40, 75])
    dtype = query.dtype
    highest, total = np.full((1, 3), NOTHING, dtype), np.zeros((1, 3), dtype)
    output, block, logits = np.zeros((1, 3, 64), dtype), np.zeros((3, BLOCK_TOKENS), dtype), np.zeros((3, 77), dtype)
    nobody = np.full_like(values, np.nan) if kind != "bfloat16" else np.full_like(values, 0x7FC0)
    for begin, end in ((0, 40), (40, 75)):
        state = highest[0], total[0], output[0]
        attend_tokens(query, keys, nobody, begin, end, 0.3, 0.0, block, *state, logits, 0, True, False)
    attention, normaliser = np.full((3, 64), 7, dtype), np.empty(3, dtype)
    merge(highest, total, output, attention, normaliser, False)
    np.testing.assert_array_equal(logits[:, :75], whole.logits[:, :75])
    np.testing.assert_allclose(normaliser, whole.normaliser, rtol=1e-6, atol=0)
    assert (attention == 7).all()
