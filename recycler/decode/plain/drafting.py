"""Drafts and their verification on the plain path: a model's own modules, and attention that reads like the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import RunningTotals, Totals
from recycler.decode.engine import Drafting
from recycler.decode.first_sets import FirstSets, LayerFirstSets, first_sets_of_layer
from recycler.decode.own_modules import forward_on_modules
from recycler.decode.plain.attention import MaskedSets
from recycler.decode.plain.step import PlainUnits
from recycler.model.attention_hook import refuse_full_window
from recycler.model.shape import window_of_recycled_layers
from recycler.sets.recycled_set import RecycledSet
from recycler.sets.scores import Scoring, probabilities


class PlainDrafting(Drafting):
    """See `Drafting`. Args: those of `Engine.begin_drafts`, after the model; `inside_of` as in `PlainEngine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
        inside_of: object,
    ) -> None:
        self._model, self._layers, self._first, self._policy = model, layers, first, policy
        self._inside_of = inside_of
        self._device = first.positions.device
        self._start = torch.tensor(first.start, device=self._device)
        part = layers[0].parts[0]
        self._n_prompt = part.prompt.shape[2]
        # Of each layer, what the last verification of a row leaves: who attended to what, and with which queries.
        self._votes: list[dict[int, Tensor]] = [{} for _ in layers]
        self._queries: list[dict[int, Tensor]] = [{} for _ in layers]
        self._n_held = self._n_begun = self._n_own = np.full(first.n_rows, part.n_own)
        self._units = PlainUnits(first, policy)
        self._running = RunningTotals(self._units.full.shape)

    def begin_round(self, n_own: np.ndarray, going: np.ndarray) -> None:
        before, self._n_held = self._n_held, np.where(going, n_own, self._n_held)
        # What a row that takes no part writes meanwhile lies past what it holds.
        self._n_own = self._n_begun = n_own
        sets = [self._layer_sets(layer, self._n_held - before) for layer in range(len(self._layers))]
        ends = self._n_prompt + n_own
        self._units = PlainUnits(FirstSets.of(sets, self._first.start, int(ends.max()), row_ends=ends), self._policy)

    def draft(self, tokens: Tensor, places: Tensor, going: np.ndarray) -> Tensor:
        rows = torch.arange(len(tokens), device=self._device)
        own = torch.from_numpy(self._n_own).to(self._device)
        # Sets of rows that take no part take in tokens all the same.
        most = int(self._n_begun.max()) + self._units.n_steps + 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            cached = self._layers[layer].parts
            for part, new in zip(cached, (key, value), strict=True):
                part.make_room(most)
                part.put(new[:, :, 0], rows, own)
            keys, values = ((part.prompt, part.own[:, :, :most]) for part in cached)
            place = torch.arange(self._n_prompt + most, device=self._device)
            visible = (place >= self._start[:, None]) & (place <= self._n_prompt + own[:, None])
            attention = MaskedSets(query[..., 0, :], keys, values, visible, scoring)
            return self._units.attend(layer, query[..., 0, :], attention, tokens[:, None], going).output[..., None, :]

        logits = forward_on_modules(self._model, tokens[:, None], places[:, None], attend, inside_of=self._inside_of)
        units = self._units
        self._running.add(units.full, units.keys_only, units.tokens_read, units.overruled)
        self._n_own = self._n_own + going
        return logits[:, -1]

    def verify(self, tokens: Tensor, places: Tensor, rows: np.ndarray) -> Tensor:
        n_tokens = np.bincount(rows, minlength=len(self._n_held))
        first = np.cumsum(n_tokens) - n_tokens
        own = self._n_held[rows] + np.arange(len(rows)) - first[rows]
        refuse_full_window(0, self._n_prompt + int(own.max()) + 1, window_of_recycled_layers(self._model))
        at = torch.from_numpy(rows).to(self._device), torch.from_numpy(own).to(self._device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            cached = self._layers[layer].parts
            for part, new in zip(cached, (key, value), strict=True):
                part.put(new[0].transpose(0, 1), *at)
            outputs = []
            for row in np.flatnonzero(n_tokens):
                some = slice(first[row], first[row] + n_tokens[row])
                outputs.append(self._attend_row(layer, int(row), query[0, :, :, some], scoring))
            return torch.cat(outputs, dim=2)[None]

        logits = forward_on_modules(self._model, tokens[None], places[None], attend, inside_of=self._inside_of)
        return logits[0]

    def totals(self) -> Totals:
        return self._running.totals()

    def _layer_sets(self, layer: int, n_kept: np.ndarray) -> LayerFirstSets:
        """Sets of a layer, those of each row by its last verification, of which so many tokens are kept."""
        of_rows = [self._row_sets(layer, row, int(n)) for row, n in enumerate(n_kept)]
        sets = RecycledSet(
            torch.cat([of.sets.positions for of in of_rows]),
            torch.cat([of.sets.scores for of in of_rows]),
            self._first.selection,
        )
        return LayerFirstSets(sets, torch.cat([of.query for of in of_rows]), torch.cat([of.mass for of in of_rows]))

    def _row_sets(self, layer: int, row: int, n_kept: int) -> LayerFirstSets:
        first, end = self._first, self._n_prompt + int(self._n_held[row])
        some = slice(row, row + 1)
        if row not in self._votes[layer]:
            sets = RecycledSet(first.positions[layer, some], first.scores[layer, some], first.selection)
            return LayerFirstSets(sets, first.query[layer, some], first.mass[layer, some])
        votes, query = self._votes[layer][row][None, ..., :end], self._queries[layer][row]
        last = query[None, :, :, max(n_kept, 1) - 1]
        start = int(first.start[row])
        return first_sets_of_layer(layer, first.selection, last, votes / votes.sum(-1, keepdim=True), start, end, votes)

    def _attend_row(self, layer: int, row: int, query: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention of the last tokens of a row, `(kv_heads, group, n, head_dim)`; its votes are kept."""
        n, end = query.shape[2], self._n_prompt + int(self._n_held[row]) + query.shape[2]
        key, value = (
            torch.cat([part.prompt[row % len(part.prompt)], part.own[row, :, : end - self._n_prompt]], dim=1)
            for part in self._layers[layer].parts
        )
        place = torch.arange(end, device=self._device)
        seen = (place >= self._start[row]) & (place <= torch.arange(end - n, end, device=self._device)[:, None])
        products = (query.flatten(1, 2) @ key.transpose(-1, -2)).unflatten(1, query.shape[1:3])
        logits = scoring.logits(products)
        weights = probabilities(logits.clone(), seen)
        self._votes[layer][row] = weights.sum(2)
        self._queries[layer][row] = query
        # Whose sinks and sums are by head: queries come first.
        allowed = logits.masked_fill(~seen, float("-inf")).movedim(2, 0)
        summing = scoring.weights(weights.movedim(2, 0), allowed).movedim(0, 2).to(value.dtype)
        attended: Tensor = (summing.flatten(1, 2) @ value).unflatten(1, query.shape[1:3])
        return attended
