"""Decoding where every layer chooses at every step what it attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.counts import RunningTotals, Totals
from recycler.decode.engine import Decoding
from recycler.decode.own_modules import forward_on_modules
from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows
from recycler.model.shape import model_shape
from recycler.sets.scores import Scoring, masked


class Chosen(NamedTuple):
    """What a layer attends to at a step.

    Attributes:
        allowed: bool `(..., kv_heads, group, tokens)`.
        tokens_read: float64 `(..., kv_heads)`: what choosing and attending read of the cache, in tokens: keys and
            values of one token count 1, keys alone one half.
        keys_only: Whether all keys were read to choose, and values of the chosen tokens alone.
    """

    allowed: Tensor
    tokens_read: Tensor
    keys_only: bool = False


Choose = Callable[[int, Tensor, Tensor, Tensor], Chosen]
"""Gets layer, query `(rows, kv_heads, group, head_dim)`, key `(rows, kv_heads, tokens, head_dim)`, the newest token
last, and logits `(rows, kv_heads, group, tokens)`, which it leaves as they are. Layers are asked in their order, step
by step."""


def begin_choosing(model: PreTrainedModel, prompt: ReadPrompt, choose: Choose) -> Rows:
    """Begin to decode, one row per prompt."""
    return Rows(ChoosingDecoding(model, prompt, choose), len(prompt.logits), prompt.n_tokens)


class ChoosingDecoding(Decoding):
    """A row per prompt on the model's own modules; every step computes all scores and masks them.

    Args:
        model: The model that read the prompts.
        prompt: Where decoding begins.
        choose: What to attend to.
    """

    def __init__(self, model: PreTrainedModel, prompt: ReadPrompt, choose: Choose) -> None:
        n_rows = len(prompt.logits)
        self._model, self._choose = model, choose
        self._layers, self._passing = prompt.caches(n_rows), prompt.passing_cache(n_rows)
        shape = (n_rows, *model_shape(model).units)
        self._full, self._keys_only = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self._tokens_read = np.zeros(shape)
        self._running = RunningTotals(shape)

    @property
    def full(self) -> np.ndarray:
        return self._full.copy()

    @property
    def keys_only(self) -> np.ndarray:
        return self._keys_only.copy()

    @property
    def tokens_read(self) -> np.ndarray:
        return self._tokens_read.copy()

    def totals(self) -> Totals:
        return self._running.totals()

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            cached = self._layers[layer].parts
            for part, new in zip(cached, (key, value), strict=True):
                part.append(new)
            keys, values = (part.joined() for part in cached)
            query = query[..., 0, :]
            logits = scoring.logits(query @ keys.transpose(-1, -2))
            chosen = self._choose(layer, query, keys, logits)
            everything = chosen.allowed.all(-1).all(-1).cpu().numpy()
            # Who looks at all keys takes a full step at half the cost, as in a keys-only refresh.
            self._full[:, layer] = everything | chosen.keys_only
            self._keys_only[:, layer] = chosen.keys_only & ~everything
            self._tokens_read[:, layer] = chosen.tokens_read.cpu().numpy()
            logits = masked(logits, chosen.allowed)
            return (scoring.weights(logits.softmax(-1), logits).to(values.dtype) @ values)[..., None, :]

        places = places.expand(len(tokens))[:, None]
        with torch.inference_mode():
            logits = forward_on_modules(self._model, tokens[:, None], places, attend, self._passing)[:, -1]
        self._running.add(self._full, self._keys_only, self._tokens_read, {})
        return logits
