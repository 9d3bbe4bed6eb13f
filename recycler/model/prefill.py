"""Prefill of long prompts in chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Bounds activations and the mask, which are as large as a chunk times the context.
PREFILL_CHUNK_TOKENS = 2048
# A chunk that begins a prompt needs no mask, and a GPU's attention is several times faster without.
_FIRST_ON_GPU_TOKENS = 32_768


def prefill(model: PreTrainedModel, tokens: Tensor, chunk_tokens: int | None = None) -> DynamicCache:
    """Run a prompt through the model's own attention, some tokens at a time.

    Args:
        model: A causal language model.
        tokens: int64 `(1, tokens)`, at least one token.
        chunk_tokens: Tokens per forward; bounds the memory of the activations. None for 2,048, and on a GPU up to
            32,768 in the first one.

    Returns:
        The cache with all tokens.

    Raises:
        ValueError: If `chunk_tokens` is below 1.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in tokens.split(chunk_sizes(tokens.shape[1], chunk_tokens, tokens.is_cuda), dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def chunk_sizes(n_tokens: int, chunk_tokens: int | None, on_gpu: bool) -> list[int]:
    """Tokens of each forward, as `prefill` takes them; `n_tokens` in all, at least 1."""
    size = PREFILL_CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
    if size < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {size}.")
    first = min(n_tokens, _FIRST_ON_GPU_TOKENS if on_gpu and chunk_tokens is None else size)
    n_whole, rest = divmod(n_tokens - first, size)
    return [first, *[size] * n_whole, *([rest] if rest else [])]
