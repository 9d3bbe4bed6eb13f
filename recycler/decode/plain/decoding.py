"""The plain path as an engine: a model's own modules, and attention that reads like the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import Totals
from recycler.decode.engine import Decoding, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.plain.attention import MaskedSets
from recycler.decode.plain.step import PlainUnits
from recycler.model.attention_hook import AttentionFunction, attention_replaced
from recycler.model.shape import recycled_layers
from recycler.sets.scores import Scoring

# (layer, query (rows, kv_heads, group, head_dim), key and value (rows, kv_heads, 1, head_dim) of the token that is fed,
# scoring) -> output (rows, kv_heads, group, head_dim of values)
Attend = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]


class PlainEngine(Engine):
    """Runs every model whose attention can be replaced, whatever the selection.

    Args:
        model: The model; it is touched only during a step.
        passing: The cache of layers that pass through; None if all are recycled.
    """

    name = "plain"

    def __init__(self, model: PreTrainedModel, passing: DynamicCache | None = None) -> None:
        self._model, self._passing = model, passing

    def begin(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> PlainDecoding:
        return PlainDecoding(self._model, layers, first, policy, self._passing)


class PlainDecoding(Decoding):
    """See `Decoding`. Args: those of `Engine.begin`, after the model; `passing` is the cache of all other layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
        passing: DynamicCache | None,
    ) -> None:
        self._model, self._layers, self._passing = model, layers, passing
        self._units = PlainUnits(first, policy)
        self._start = torch.tensor(first.start, device=first.positions.device) if first.start.any() else None

    @property
    def full(self) -> np.ndarray:
        return self._units.full.copy()

    @property
    def keys_only(self) -> np.ndarray:
        return self._units.keys_only.copy()

    @property
    def tokens_read(self) -> np.ndarray:
        return self._units.tokens_read.copy()

    def totals(self) -> Totals:
        return self._units.totals()

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            cached = self._layers[layer].parts
            for part, new in zip(cached, (key, value), strict=True):
                part.append(new)
            keys, values = (part.parts for part in cached)
            place = torch.arange(cached[0].n_tokens, device=tokens.device)
            visible = None if self._start is None else place >= self._start[:, None]
            attention = MaskedSets(query, keys, values, visible, scoring)
            return self._units.attend(layer, query, attention, tokens[:, None]).output

        return step_on_modules(self._model, tokens, places, attend, self._passing)


def step_on_modules(
    model: PreTrainedModel, tokens: Tensor, places: Tensor, attend: Attend, passing: DynamicCache | None
) -> Tensor:
    """Logits `(rows, vocabulary)` of a model's own modules around an attention that holds the cache itself.

    Args:
        model: The model.
        tokens: int64 `(rows,)`.
        places: int64 `(rows,)` or `(1,)`: their positions.
        attend: The attention of recycled layers.
        passing: The cache of layers that pass through; None if there are none.
    """
    layers = recycled_layers(model)

    def replacing(stock: AttentionFunction) -> AttentionFunction:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
            layer = layers[int(module.layer_idx)]  # type: ignore[arg-type]
            output = attend(layer, grouped, key, value, Scoring.of_call(key, kwargs))
            return output.flatten(1, 2)[:, None], None

        return attention

    # A model may call its layers for one token without a cache.
    with torch.inference_mode(), attention_replaced(model, replacing):
        position_ids = places.expand(len(tokens))[:, None]
        logits: Tensor = model(
            tokens[:, None], position_ids=position_ids, past_key_values=passing, use_cache=passing is not None
        ).logits[:, -1]
    return logits
