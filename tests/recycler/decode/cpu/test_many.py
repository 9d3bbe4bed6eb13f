"""Attention of several queries per row is that of each query alone, and its votes are their sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recycler.decode.cpu.arrays import Array, Cache, Rules
from recycler.decode.cpu.many import ALL_VOTE, Asking, attend_many, many_scratch

SCALING = 0.3


class Layer:
    """A layer's cache and some queries, and what their attention is in float64."""

    def __init__(
        self, seed: int, kind: str, n: Sequence[int], group: int, head_dim: int, n_prompt: int, shared: bool, mean: bool
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        rows, kv_heads, self.n = len(n), 2, np.array(n)
        self.first_own = np.arange(rows) % 3
        places = n_prompt + int((self.first_own + self.n).max()) + 2
        self.start = np.minimum(np.arange(rows) * 3, n_prompt - 1)

        def cached(of_rows: int, tokens: int) -> torch.Tensor:
            return torch.randn(of_rows, kv_heads, tokens, head_dim, generator=random).to(getattr(torch, kind))

        prompts = [cached(1 if shared else rows, n_prompt) for _ in range(2)]
        owns = [cached(rows, places - n_prompt) for _ in range(2)]
        self.cache = Cache(*(_stored(part) for part in (*prompts, *owns)))
        float_type = np.float64 if kind == "float64" else np.float32
        self.query = (
            torch.randn(int(self.n.sum()), kv_heads, group, head_dim, generator=random).numpy().astype(float_type)
        )
        self.first = np.cumsum(self.n) - self.n
        self.rules = Rules(1, 1, 0, 0, mean, -1.0, False, False, False, False)
        self.places = places
        keys, values = (
            torch.cat([prompt.expand(rows, -1, -1, -1), own], dim=2).double().numpy()
            for prompt, own in zip(prompts, owns, strict=True)
        )
        self.expected, self.expected_votes = np.zeros(self.query.shape), np.zeros((rows, kv_heads, places))
        for row in range(rows):
            summed = np.zeros((kv_heads, group, places))
            for i in range(self.n[row]):
                seen = slice(self.start[row], n_prompt + self.first_own[row] + i + 1)
                at = self.first[row] + i
                logits = SCALING * self.query[at].astype(np.float64) @ keys[row, :, seen].swapaxes(-1, -2)
                attention = np.exp(logits - logits.max(-1, keepdims=True))
                attention /= attention.sum(-1, keepdims=True)
                self.expected[at] = attention @ values[row, :, seen]
                summed[:, :, seen] += attention
            self.expected_votes[row] = summed.mean(1) if mean else summed.max(1)

    def attended(self, n_threads: int) -> tuple[Array, Array]:
        rows, (kv_heads, group, head_dim) = len(self.n), self.query.shape[1:]
        votes = np.zeros((rows, kv_heads, self.places), dtype=np.float32)
        asking = Asking(self.first, self.n, self.first_own, self.query, np.zeros_like(self.query), votes, ALL_VOTE)
        scratch = many_scratch(n_threads, rows * kv_heads, int(self.n.max()), group, head_dim, self.places, self.query)
        attend_many(asking, SCALING, self.start, self.cache, self.rules, scratch, n_threads)
        return asking.attended, votes


def _stored(part: torch.Tensor) -> Array:
    found: Array = (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy()
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    kind=st.sampled_from(["float32", "float64", "bfloat16"]),
    n=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    group=st.integers(1, 7),
    head_dim=st.sampled_from([8, 20, 64]),
    n_prompt=st.integers(1, 160),
    shared=st.booleans(),
    mean=st.booleans(),
    n_threads=st.integers(1, 3),
)
def test_every_query_attends_to_what_lies_before_it(
    seed: int,
    kind: str,
    n: list[int],
    group: int,
    head_dim: int,
    n_prompt: int,
    shared: bool,
    mean: bool,
    n_threads: int,
) -> None:
    layer = Layer(seed, kind, n, group, head_dim, n_prompt, shared, mean)
    attended, votes = layer.attended(n_threads)
    atol = 1e-12 if kind == "float64" else 2e-5
    np.testing.assert_allclose(attended, layer.expected, rtol=0, atol=atol)
    np.testing.assert_allclose(votes, layer.expected_votes, rtol=0, atol=2e-5)


def test_many_queries_over_many_blocks_are_as_exact() -> None:
    layer = Layer(0, "float32", [17, 9], 3, 64, 1500, False, False)
    np.testing.assert_allclose(layer.attended(2)[0], layer.expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_rows_that_ask_nothing_are_left_alone(n_threads: int) -> None:
    layer = Layer(1, "float32", [0, 4], 2, 8, 30, False, False)
    assert not layer.attended(n_threads)[1][0].any()
