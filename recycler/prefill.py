"""Prefill of long prompts in chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Bounds activations and the mask, which are as large as a chunk times the context.
PREFILL_CHUNK_TOKENS = 2048


def prefill(model: PreTrainedModel, tokens: Tensor, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> DynamicCache:
    """Run a prompt through the model's own attention, at most `chunk_tokens` tokens at a time.

    Args:
        model: A causal language model.
        tokens: int64 `(1, tokens)`, at least one token.
        chunk_tokens: Tokens per forward; bounds the memory of the activations.

    Returns:
        The cache with all tokens.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for chunk in tokens.split(chunk_tokens, dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
