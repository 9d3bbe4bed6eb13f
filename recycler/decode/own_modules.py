"""A model's own modules around an attention that holds the cache itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from recycler.model.attention_hook import AttentionFunction, attention_replaced, own_forward
from recycler.model.shape import recycled_layers
from recycler.sets.scores import Scoring

# (layer, query (rows, kv_heads, group, n, head_dim), key and value (rows, kv_heads, n, head_dim) of the n tokens that
# are fed to each row, scoring) -> output (rows, kv_heads, group, n, head_dim of values)
Attend = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]


def forward_on_modules(
    model: PreTrainedModel,
    tokens: Tensor,
    places: Tensor,
    attend: Attend,
    passing: DynamicCache | None = None,
    inside_of: object = None,
) -> Tensor:
    """Logits `(rows, n, vocabulary)` of a model's own modules around an attention of somebody else's.

    Args:
        model: The model.
        tokens: int64 `(rows, n)`.
        places: int64 of the same shape: their positions.
        attend: The attention of recycled layers.
        passing: The cache of layers that pass through; None if there are none.
        inside_of: As in `attention_hook.replaced`.
    """
    layers = recycled_layers(model)

    def replacing(stock: AttentionFunction) -> AttentionFunction:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer, grouped = layers[int(module.layer_idx)], query.unflatten(1, (key.shape[1], -1))  # type: ignore[arg-type]
            output = attend(layer, grouped, key, value, Scoring.of_call(key, kwargs))
            return output.flatten(1, 2).transpose(1, 2), None

        return attention

    # A model may call its layers for some tokens without a cache.
    with torch.inference_mode(), attention_replaced(model, replacing, inside_of=inside_of):
        # Inside of a call of the model, what is around its forward was called already.
        forward = model if inside_of is None else own_forward(model)
        logits: Tensor = forward(
            tokens, position_ids=places, past_key_values=passing, use_cache=passing is not None
        ).logits
    return logits
