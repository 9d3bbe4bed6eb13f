"""What the last prompt of a session left behind, layer by layer as the model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies import ModelShape, Selection
from recycler.decode.cache import KvLayer
from recycler.decode.cache_watch import CacheWatch
from recycler.decode.first_sets import FirstSets, LayerFirstSets, first_sets_of_layer
from recycler.model.decoder_parts import NotCovered
from recycler.sets.prompt_votes import PromptVotes
from recycler.sets.scores import Scoring, probabilities


class LastPrompt:
    """A prompt, or a turn that came after it; a new one takes the place of the one before.

    Args:
        shape: The model's.
        selection: How its first sets are chosen.
    """

    def __init__(self, shape: ModelShape, selection: Selection) -> None:
        self._shape, self._selection = shape, selection
        self._layers: dict[int, LayerFirstSets] = {}
        self._watches: dict[int, CacheWatch] = {}
        self._votes: dict[int, PromptVotes] = {}
        self._bad: dict[int, Tensor] = {}
        self._start: Tensor | int = 0
        self._end = 0

    @property
    def is_read(self) -> bool:
        """Whether all layers have read it, so that decoding can begin."""
        return len(self._layers) == self._shape.layers

    def check_read(self) -> None:
        """Refuse a model whose layers did not all come by, once its forward has read something.

        Raises:
            ValueError: With the numbers of layers.
        """
        if not self.is_read:
            raise ValueError(
                f"only {len(self._layers)} of the {self._shape.layers} layers of {self._shape.id} attend through "
                "transformers' AttentionInterface: it cannot be recycled."
            )

    @property
    def watches(self) -> Mapping[int, CacheWatch]:
        """Of each layer's cache, as it was left."""
        return dict(self._watches)

    def read(self, layer: int, query: Tensor, key: Tensor, visible: Tensor | None, scoring: Scoring) -> None:
        """Choose the first sets of a layer at the end of a prompt, or of a chunk of it.

        Args:
            layer: Index of the layer.
            query: `(rows, query_heads, n, head_dim)`, those of the last n places of the cache.
            key: `(rows, kv_heads, tokens, head_dim)`, the whole cache.
            visible: bool `(rows, tokens)`, False at padding; None if there is none.
            scoring: What becomes of query x key.
        """
        # A number where nothing is masked, as a chunk's mask of all tokens: it broadcasts, and is not looked at again.
        visible = None if visible is None or visible.all() else visible
        self._start = 0 if visible is None else visible.to(torch.uint8).argmax(-1)[:, None, None]
        self._end, votes = key.shape[2], None
        grouped = query.unflatten(1, (self._shape.kv_heads, -1))
        seen = None if visible is None else visible[:, None, None]
        weights = probabilities(scoring.logits(grouped[:, :, :, -1] @ key.transpose(-1, -2)), seen)
        if self._selection.prompt_queries != 1:
            watching = self._votes.setdefault(layer, PromptVotes(self._selection.prompt_queries))
            votes = watching.see(grouped, key, visible, scoring)
        self._layers[layer] = first_sets_of_layer(
            layer, self._selection, grouped[:, :, :, -1], weights, self._start, self._end, votes
        )
        self._watches[layer] = CacheWatch(key, self._start)
        # One NaN among a row's keys, or in its query, is one in all of its weights.
        self._bad[layer] = weights[..., 0].isnan().flatten(1).any(-1)

    @property
    def bad_rows(self) -> Tensor:
        """bool `(rows,)`: rows whose last query, or one of whose keys, has a NaN."""
        return torch.stack(list(self._bad.values())).any(0)

    def first_sets(self) -> FirstSets:
        """The sets of all layers, from which rows decode."""
        layers = [self._layers[layer] for layer in range(self._shape.layers)]
        if isinstance(self._start, int):
            return FirstSets.of(layers, np.full(1, self._start), self._end)
        return FirstSets.of(layers, self._start[:, 0, 0].cpu().numpy(), self._end)

    def check(self, cache: Any, recycled: Mapping[int, int]) -> None:
        """Refuse a cache that is not as the prompt left it.

        Args:
            cache: The cache.
            recycled: Which recycled layer each of its layers is, as in `recycled_layers`.

        Raises:
            NotCovered: If it holds something else than the keys that attention reads, or a layer holds none.
            ValueError: If it is another.
        """
        held = getattr(cache, "layers", None)
        if held is None:
            return
        for index, layer in recycled.items():
            of_layer = held[index] if index < len(held) else None
            keys = getattr(of_layer, "keys", None)
            if keys is None and not isinstance(of_layer, KvLayer):
                raise NotCovered("a layer attends to the tokens of another one")
            self._watches[layer].check(keys)
