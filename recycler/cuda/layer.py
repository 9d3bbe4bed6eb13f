"""What a decoder layer does besides attention, as torch functions for one token per row; compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from recycler.model_weights import DecoderParts


class LayerWeights(NamedTuple):
    """A decoder layer's weights, where they lie in the model; matrices are `(outputs, inputs)`."""

    norm: Tensor
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    feed_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def layer_weights(layer: Any) -> LayerWeights:
    """The weights of a layer of `DecoderParts`."""
    attention, mlp = layer.self_attn, layer.mlp

    def of(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()

    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        *of(attention.q_proj),
        *of(attention.k_proj),
        *of(attention.v_proj),
        None if query_norm is None else query_norm.weight.detach(),
        None if key_norm is None else key_norm.weight.detach(),
        *of(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        *of(mlp.gate_proj),
        *of(mlp.up_proj),
        *of(mlp.down_proj),
    )


class LayerMath:
    """The functions, with a model's constants in them.

    Args:
        parts: Of the model.
        compiles: Whether torch compiles the functions.

    Attributes:
        project: `(x, weights, cosine, sine)` to queries `(rows, query_heads, head_dim)`, keys and values
            `(rows, kv_heads, head_dim)`, after rotary embedding; `x` is the residual stream `(rows, hidden)`.
        feed: `(x, attended, weights)` to the residual stream after the layer.
        predict: `(x)` to logits `(rows, vocabulary)`.
    """

    def __init__(self, parts: DecoderParts, compiles: bool) -> None:
        first = parts.layers[0]
        eps, feed_eps = first.input_layernorm.variance_epsilon, first.post_attention_layernorm.variance_epsilon
        head_dim = first.self_attn.head_dim
        query_norm = getattr(first.self_attn, "q_norm", None)
        head_eps = 0.0 if query_norm is None else query_norm.variance_epsilon
        last_norm, last_eps = parts.norm.weight.detach(), parts.norm.variance_epsilon
        head = parts.head.weight.detach()
        head_bias = None if parts.head.bias is None else parts.head.bias.detach()

        def project(x: Tensor, weights: LayerWeights, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            normed = _rms_norm(x, weights.norm, eps)
            query = linear(normed, weights.query, weights.query_bias).unflatten(-1, (-1, head_dim))
            key = linear(normed, weights.key, weights.key_bias).unflatten(-1, (-1, head_dim))
            value = linear(normed, weights.value, weights.value_bias).unflatten(-1, (-1, head_dim))
            if weights.query_norm is not None and weights.key_norm is not None:
                query = _rms_norm(query, weights.query_norm, head_eps)
                key = _rms_norm(key, weights.key_norm, head_eps)
            query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
            return query.contiguous(), key.contiguous(), value.contiguous()

        def feed(x: Tensor, attended: Tensor, weights: LayerWeights) -> Tensor:
            x = x + linear(attended, weights.output, weights.output_bias)
            normed = _rms_norm(x, weights.feed_norm, feed_eps)
            gate = silu(linear(normed, weights.gate, weights.gate_bias))
            up = linear(normed, weights.up, weights.up_bias)
            return x + linear(gate * up, weights.down, weights.down_bias)

        def predict(x: Tensor) -> Tensor:
            return linear(_rms_norm(x, last_norm, last_eps), head, head_bias)

        shapes = tuple(None if part is None else part.shape for part in (*layer_weights(first), head, head_bias))
        key = (head.dtype, shapes, eps, feed_eps, head_dim, head_eps, last_eps)

        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(with_code_of_its_own(function, key)) if compiles else function

        self.project, self.feed, self.predict = ready(project), ready(feed), ready(predict)


def with_code_of_its_own(function: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
    """The same function with code that functions of the same key share, and no others.

    torch counts compilations by code, gives up after eight, and takes for variable what differs between them: models of
    other shapes must not be among them.
    """
    code: CodeType = function.__code__
    return FunctionType(
        _code_for(code, key), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


@cache
def _code_for(code: CodeType, key: Hashable) -> CodeType:
    return code.replace(co_name=code.co_name)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers rounds it: normalised in float32, weighed in the model's type."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves as transformers has them; angles are `(rows or 1, 1, head_dim)`."""
    low, high = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-high, low), dim=-1) * sine
