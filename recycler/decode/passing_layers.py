"""Layers that pass through, a window or a recurrence, beside recycled layers whose tokens lie elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PassingLayers:
    """What a prompt, or several of one length, left of the layers that pass through.

    Args:
        caches: One for each prompt, of one row each; they are not changed.
        recycled: Indices of the recycled layers.
    """

    def __init__(self, caches: Sequence[DynamicCache], recycled: Collection[int]) -> None:
        self._recycled = recycled
        self._caches = [self._without_recycled(cache) for cache in caches]

    @classmethod
    def side_by_side(cls, parts: Sequence[PassingLayers]) -> PassingLayers:
        """Of several prompts: row i decodes from prompt i modulo their number."""
        return cls([cache for part in parts for cache in part._caches], parts[0]._recycled)

    def cache(self, n_rows: int) -> DynamicCache:
        """A cache of rows that decode from here: layers that pass through keep their own state in it."""
        rows, in_turn = copy.deepcopy(self._caches[0]), torch.arange(n_rows) % len(self._caches)
        for index, layer in enumerate(rows.layers):
            if index not in self._recycled:
                _join(layer, [cache.layers[index] for cache in self._caches])
                layer.reorder_cache(in_turn)  # type: ignore[arg-type]
        return rows

    def _without_recycled(self, cache: DynamicCache) -> DynamicCache:
        # A layer that attends to the tokens of another one has none of its own.
        held = [index for index in self._recycled if getattr(cache.layers[index], "keys", None) is not None]
        return beside_recycled(cache, held, cache.get_seq_length(held[0]) if held else 0)


def beside_recycled(cache: DynamicCache, recycled: Collection[int], n_tokens: int) -> DynamicCache:
    """A cache with the very layers of another one that pass through, and recycled ones that only count their tokens."""
    without = copy.copy(cache)
    without.layers = list(cache.layers)
    for index in recycled:
        without.layers[index] = _Elsewhere(n_tokens)
    return without


class _Elsewhere(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer whose attention keeps its tokens itself: it only counts them, and hands on those that come.

    Args:
        n_tokens: Tokens of the prompt.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._n_tokens = n_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._n_tokens += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._n_tokens


def _join(into: Any, layers: Sequence[Any]) -> None:
    """Put the rows of layers together: tokens of a window, and states of a recurrence, by their number."""
    for name in ("keys", "values"):
        if isinstance(getattr(into, name, None), Tensor):
            setattr(into, name, torch.cat([getattr(layer, name) for layer in layers]))
    for name in ("conv_states", "recurrent_states"):
        states: dict[int, Tensor | None] = getattr(into, name, {})
        for number, state in states.items():
            if state is not None:
                states[number] = torch.cat([getattr(layer, name)[number] for layer in layers])
