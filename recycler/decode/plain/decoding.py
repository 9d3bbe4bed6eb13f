"""The plain path as an engine: a model's own modules, and attention that reads like the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import Totals
from recycler.decode.engine import Decoding, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.own_modules import forward_on_modules
from recycler.decode.plain.attention import MaskedSets
from recycler.decode.plain.drafting import PlainDrafting
from recycler.decode.plain.step import PlainUnits
from recycler.model.decoder_parts import NotCovered, counts_tokens
from recycler.model.shape import n_layers, recycled_layers
from recycler.sets.scores import Scoring


class PlainEngine(Engine):
    """Runs every model whose attention can be replaced, whatever the selection.

    Args:
        model: The model; it is touched only during a step.
        inside_of: Whose functions run in the place of the model's where steps are taken; None for nobody's.
    """

    name, holds_weights = "plain", False

    def __init__(self, model: PreTrainedModel, inside_of: object = None) -> None:
        self._model, self._inside_of, self.counts_tokens = model, inside_of, counts_tokens(model)

    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> PlainDecoding:
        return PlainDecoding(self._model, layers, first, policy, passing)

    def begin_drafts(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> PlainDrafting:
        if len(recycled_layers(self._model)) < n_layers(self._model):
            raise NotCovered("layers with a window or a recurrence do not take back what was drafted")
        return PlainDrafting(self._model, layers, first, policy, self._inside_of)


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
            attention = MaskedSets(query[..., 0, :], keys, values, visible, scoring)
            return self._units.attend(layer, query[..., 0, :], attention, tokens[:, None]).output[..., None, :]

        places = places.expand(len(tokens))[:, None]
        return forward_on_modules(self._model, tokens[:, None], places, attend, self._passing)[:, -1]
