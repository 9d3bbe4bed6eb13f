"""The parts of a transformers model that an engine computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from recycler.model.attention_hook import own_forward
from recycler.model.model_watch import GLOBAL_HOOKS
from recycler.model.shape import n_layers, recycled_layers

# One decoder: RMS norms, rotary embedding, grouped attention, a gated feed-forward layer. Qwen2 adds biases, Qwen3
# norms of the heads. A subclass may compute anything, so types are compared exactly.
_COVERED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def counts_tokens(model: PreTrainedModel) -> bool:
    """Whether a token's position is known to be the number of those before it, where a call does not say.

    Other families begin at 1, count what a mask shows, or go on after an image.
    """
    return type(model) in _COVERED


# Where types of their modules are defined, beside the file of the model itself.
_PLAIN_MODULES = ("torch.nn.modules.", "transformers.activations")
# Types of weights whose memory holds their numbers; packed ones are types of their own.
_WEIGHTS: tuple[type, ...] = (nn.Parameter,)


class NotCovered(Exception):  # noqa: N818 - an answer, not an error: the plain path takes over.
    """Why an engine does not run a model or a call, as a clause that fits after "because"."""


@dataclass(frozen=True)
class DecoderParts:
    """Modules of a model of the covered kind, checked to be what they seem.

    Attributes:
        embedding: Token embedding.
        rotary: Rotary embedding: called with a tensor (for its type) and positions, gives cosine and sine.
        layers: Decoder layers.
        norm: Last norm.
        head: Language-model head.
        dtype: Of all weights.
        window: The smallest sliding window of a layer, None if none has one.
    """

    embedding: nn.Embedding
    rotary: nn.Module
    layers: tuple[Any, ...]
    norm: Any
    head: nn.Linear
    dtype: torch.dtype
    window: int | None


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Take a model apart.

    Raises:
        NotCovered: If the model is of another kind, has been changed (adapters, hooks, quantized layers), is in
            training mode, or lies on several devices or in several types.
    """
    if type(model) not in _COVERED:
        names = ", ".join(kind.__name__ for kind in _COVERED)
        raise NotCovered(f"it runs {names}, and this is {type(model).__name__}")
    if len(recycled_layers(model)) < n_layers(model):
        raise NotCovered("some of its layers attend to a window and pass through")
    if model.training:
        raise NotCovered("the model is in training mode")
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__ != type(model).__module__ and not kind.__module__.startswith(_PLAIN_MODULES):
            raise NotCovered(f"{name} is a {kind.__module__}.{kind.__qualname__}")
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves its own behind once hidden states were asked for; they wait for that to happen again.
        foreign = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
        forward = own_forward(model) if module is model else module.forward
        if foreign or getattr(forward, "__func__", None) is not kind.forward:
            raise NotCovered(f"{name or 'the model'} has hooks")
    if any(GLOBAL_HOOKS):
        raise NotCovered("there are hooks on all modules")
    decoder = model.model
    layers = tuple(decoder.layers)
    for name, linear in _linear_layers(model):
        if type(linear) is not nn.Linear:
            raise NotCovered(f"{name} is a {type(linear).__name__}, not a Linear")
    activation = model.config.hidden_act
    if activation != "silu":
        raise NotCovered(f"it runs the activation silu, and this model has {activation}")
    tensors = list(model.parameters())
    for tensor in tensors:
        if type(tensor) not in _WEIGHTS:
            raise NotCovered(f"a weight is a {type(tensor).__name__}, not a Parameter")
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        raise NotCovered("the weights are of several types or on several devices")
    windows = [window for layer in layers if (window := getattr(layer.self_attn, "sliding_window", None)) is not None]
    return DecoderParts(
        embedding=decoder.embed_tokens,
        rotary=decoder.rotary_emb,
        layers=layers,
        norm=decoder.norm,
        head=model.lm_head,
        dtype=tensors[0].dtype,
        window=min(windows, default=None),
    )


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    for i, layer in enumerate(model.model.layers):
        for part, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ):
            for name in names:
                yield f"layers.{i}.{part}.{name}", getattr(getattr(layer, part), name)
    yield "lm_head", model.lm_head


def bias_of(linear: nn.Linear) -> Tensor:
    """The bias of a linear layer, empty if it has none."""
    return linear.weight.new_empty(0) if linear.bias is None else linear.bias
