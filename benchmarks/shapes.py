"""Models with random weights in the shape of known ones: times depend on sizes, not on what the numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # meta-llama/Llama-3.1-8B, config.json; positions beyond its own, for a context of 128K and what is added.
        "llama-3.1-8b": {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        # For trying a benchmark out.
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 262144,
        },
    }
)


def random_model(shape: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model of a shape, made on the device.

    Raises:
        ValueError: If there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"--shape takes {' or '.join(SHAPES)}, not {shape!r}.")
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
