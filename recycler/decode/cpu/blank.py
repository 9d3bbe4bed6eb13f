"""A prompt of nothing, for kernels to be compiled on before anybody waits for a step."""

from __future__ import annotations

import numpy as np
import torch

from policies import ModelShape, Selection
from recycler.decode.cache import GrowingTokens, KvLayer
from recycler.decode.first_sets import FirstSets, first_sets_of_layer

_N_TOKENS = 2


def blank_prompt(shape: ModelShape, dtype: torch.dtype) -> tuple[list[KvLayer], FirstSets]:
    """One layer and one row of two tokens of zeros, and what they leave to decoding.

    Kernels are compiled for types and numbers of axes: a prompt of any length, with sets of any size, takes the same.

    Args:
        shape: The model's.
        dtype: What keys and values are kept in.
    """
    kv_heads, head_dim, group = shape.kv_heads, shape.head_dim, shape.query_heads // shape.kv_heads
    key, value = (GrowingTokens.after(torch.zeros(1, kv_heads, _N_TOKENS, head_dim, dtype=dtype)) for _ in range(2))
    query = torch.zeros(1, kv_heads, group, head_dim, dtype=dtype)
    weights = torch.full((1, kv_heads, group, _N_TOKENS), 1 / _N_TOKENS)
    sets = first_sets_of_layer(0, Selection(_N_TOKENS, sinks=0, window=1), query, weights, 0, _N_TOKENS)
    return [KvLayer(key, value)], FirstSets.of([sets], np.zeros(1, dtype=np.int64), _N_TOKENS)
