"""Replacing a model's attention function for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# fn(module, query, key, value, attention_mask, **kwargs) -> (output (batch, tokens, heads, head_dim), weights or None)
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_SUPPORTED = ("sdpa", "eager")
# Arguments that change what attention means; ignoring one would be silently wrong.
_REFUSED_ARGUMENTS = ("s_aux", "softcap", "position_bias")


@contextmanager
def attention_replaced(
    model: PreTrainedModel, make: Callable[[AttentionFunction], AttentionFunction]
) -> Iterator[None]:
    """Run all attention of `model` through a function of ours, and put everything back at the end.

    Masks stay those of the model's own implementation.

    Args:
        model: A model whose attention goes through transformers' AttentionInterface.
        make: Given the stock attention function, returns the one to use instead.

    Raises:
        ValueError: If the model's implementation is neither `sdpa` nor `eager`, or cannot be replaced.
    """
    original = model.config._attn_implementation
    if original not in _SUPPORTED:
        raise ValueError(
            f"recycled attention replaces 'sdpa' or 'eager' attention, and this model runs {original!r}: "
            "load it with attn_implementation='sdpa'."
        )
    function = make(_stock_attention(model, original))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        for name in _REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"attention with {name!r} ({type(module).__name__}) is not supported.")
        return function(module, *args, **kwargs)

    name = f"recycled-{id(attention):x}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention function be replaced.")
        yield
    finally:
        model.set_attn_implementation(original)
        # Registering has a public way in and none out.
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def refuse_full_window(layer: int, n_tokens: int, window: int | None) -> None:
    """Refuse a context that a layer with a sliding window no longer sees as a whole.

    Raises:
        ValueError: With the layer and its window.
    """
    if window is not None and n_tokens >= window:
        raise ValueError(
            f"layer {layer} attends to a sliding window of {window} tokens and the context has reached it: "
            "recycled attention covers contexts within the window only."
        )


def _stock_attention(model: PreTrainedModel, implementation: str) -> AttentionFunction:
    if implementation in ALL_ATTENTION_FUNCTIONS:
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[implementation]
        return function

    # Eager attention is a function of each model's own module.
    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = sys.modules[type(module).__module__].eager_attention_forward(
            module, *args, **kwargs
        )
        return result

    return eager
