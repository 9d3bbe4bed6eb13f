"""What a decoder layer does besides attention, as torch functions for one token per row; compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from recycler.model.decoder_parts import DecoderParts, NotCovered


class LayerWeights(NamedTuple):
    """A decoder layer's weights, where they lie in the model; matrices are `(outputs, inputs)`."""

    norm: Tensor
    projections: Tensor
    projections_bias: Tensor | None
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


class LastWeights(NamedTuple):
    """The weights after the last layer."""

    norm: Tensor
    head: Tensor
    head_bias: Tensor | None


def layer_weights(layer: Any) -> LayerWeights:
    """The weights of a layer of `DecoderParts`, those for queries, keys and values brought together."""
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        *stacked((attention.q_proj, attention.k_proj, attention.v_proj)),
        None if query_norm is None else query_norm.weight.detach(),
        None if key_norm is None else key_norm.weight.detach(),
        *_linear_weights(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        *_linear_weights(mlp.gate_proj),
        *_linear_weights(mlp.up_proj),
        *_linear_weights(mlp.down_proj),
    )


def last_weights(parts: DecoderParts) -> LastWeights:
    """The weights after the last layer of `DecoderParts`."""
    return LastWeights(parts.norm.weight.detach(), *_linear_weights(parts.head))


def stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear layers with the same inputs, one below the other.

    The layers' own become parts of them, so that nothing is there twice.

    Raises:
        NotCovered: If some of the layers have biases and others have none.
    """
    with_bias = [layer for layer in layers if layer.bias is not None]
    if len(with_bias) not in (0, len(layers)):
        raise NotCovered("some of the projections to queries, keys and values have biases, and others have none")
    # The layers may be trained later on, whatever mode they decode in.
    with torch.inference_mode(False), torch.no_grad():
        weight = _stacked([layer.weight for layer in layers])
        return weight, _stacked([layer.bias for layer in layers]) if with_bias else None


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    ends = [part.storage_offset() + part.numel() for part in parts]
    if all(part.is_contiguous() for part in parts) and all(
        after.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and after.storage_offset() == end
        for after, end in zip(parts[1:], ends, strict=False)
    ):
        n = sum(len(part) for part in parts)
        return first.detach().as_strided((n, *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, of_whole in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = of_whole
    return whole


def _linear_weights(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


class LayerMath:
    """What happens between the attention of one layer and that of the next, with a model's constants in it.

    One function from attention to attention leaves the fewest kernels.

    Args:
        parts: Of the model.
        rows: Of the batch.
        compiles: Whether torch compiles the functions.

    Attributes:
        enter: `(x, weights, cosine, sine)` to queries `(rows, query_heads, head_dim)`, keys and values
            `(rows, kv_heads, head_dim)` of the first layer, after rotary embedding; `x` is the residual stream
            `(rows, hidden)`.
        cross: `(x, attended, weights, following, cosine, sine)` to the residual stream after a layer, and queries, keys
            and values of the one that follows.
        leave: `(x, attended, weights, last)` to logits `(rows, vocabulary)` after the last layer.
    """

    def __init__(self, parts: DecoderParts, rows: int, compiles: bool) -> None:
        first = parts.layers[0]
        eps, feed_eps = first.input_layernorm.variance_epsilon, first.post_attention_layernorm.variance_epsilon
        attention, last_eps = first.self_attn, parts.norm.variance_epsilon
        query_norm = getattr(attention, "q_norm", None)
        head_eps = 0.0 if query_norm is None else query_norm.variance_epsilon
        head_dim = attention.head_dim
        n_heads = [module.out_features // head_dim for module in (attention.q_proj, attention.k_proj, attention.v_proj)]

        def enter(x: Tensor, weights: LayerWeights, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            normed = _rms_norm(x, weights.norm, eps)
            heads = linear(normed, weights.projections, weights.projections_bias).unflatten(-1, (-1, head_dim))
            query, key, value = heads.split(n_heads, dim=1)
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

        def cross(
            x: Tensor, attended: Tensor, weights: LayerWeights, following: LayerWeights, cosine: Tensor, sine: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = feed(x, attended, weights)
            return x, *enter(x, following, cosine, sine)

        def leave(x: Tensor, attended: Tensor, weights: LayerWeights, last: LastWeights) -> Tensor:
            return linear(_rms_norm(feed(x, attended, weights), last.norm, last_eps), last.head, last.head_bias)

        weights = (*layer_weights(first), *last_weights(parts))
        shapes = tuple(None if part is None else part.shape for part in weights)
        key = (parts.dtype, rows, shapes, eps, feed_eps, head_dim, head_eps, last_eps)

        def ready(function: Callable[..., Any]) -> Callable[..., Any]:
            if not compiles:
                return function
            return torch.compile(with_code_of_its_own(function, key), dynamic=False)

        self.enter, self.cross, self.leave = ready(enter), ready(cross), ready(leave)


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
