"""Attention of one query token per row, in which every unit is either full or recycled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from recycler.sets.recycled_set import RecycledSet, UnitIndex
from recycler.sets.scores import Scoring, masked


@dataclass(frozen=True)
class UnitAttention:
    """What a decode step's attention leaves behind.

    Attributes:
        output: `(rows, kv_heads, group, head_dim)`, the head size being that of values.
        full: The units that attended to the whole cache; none of them where nobody asked for their probabilities.
        full_probabilities: `(n_full, group, tokens)`.
        recycled: The units that attended to their sets.
        set_probabilities: `(n_recycled, group, k)`, over the slots of their sets.
    """

    output: Tensor
    full: UnitIndex
    full_probabilities: Tensor
    recycled: UnitIndex
    set_probabilities: Tensor


class StepAttention(ABC):
    """A layer's queries at a step before its cache, which they can read in two ways."""

    @abstractmethod
    def score(self, units: UnitIndex) -> Tensor:
        """What n units would attend to in the whole cache, `(n, group, tokens)`; only keys are read."""

    @abstractmethod
    def attend(self, full: Tensor, sets: RecycledSet, *, scored: bool = True) -> UnitAttention:
        """Attention of all units.

        Args:
            full: bool `(rows, kv_heads)`: units that attend to the whole cache; the others attend to their sets.
            sets: Sets of all units.
            scored: Whether the probabilities of full units are asked for.
        """


@dataclass(frozen=True)
class GatheredSets(StepAttention):
    """Full units read the whole cache, recycled units gather their sets out of it.

    Attributes:
        query: `(rows, kv_heads, group, head_dim)`.
        key: `(rows, kv_heads, tokens, head_dim)`, the whole cache.
        value: The same shape, but for the head size.
        visible: bool `(rows, tokens)`, False at padding; None if there is none.
        scoring: What becomes of query x key.
        whole_elsewhere: Whether the caller has another function for steps at which all units are full, and wants no
            output then.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    scoring: Scoring
    whole_elsewhere: bool = False

    def score(self, units: UnitIndex) -> Tensor:
        return self._whole(units).softmax(-1)

    def attend(self, full: Tensor, sets: RecycledSet, *, scored: bool = True) -> UnitAttention:
        query, value = self.query, self.value
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        full_units, recycled_units = full.nonzero(as_tuple=True), (~full).nonzero(as_tuple=True)

        summed = not (self.whole_elsewhere and full.all())
        full_probabilities = query.new_empty((0, query.shape[2], value.shape[2]))
        if full_units[0].numel() and (scored or summed):
            logits = self._whole(full_units)
            full_probabilities = logits.softmax(-1)
            if summed:
                weights = self.scoring.weights(full_probabilities, logits, full_units[1]).to(value.dtype)
                each = zip(weights, _each(value, full_units), strict=True)
                output[full_units] = torch.stack([weight @ one for weight, one in each])
        if not scored:
            full_units = tuple(index[:0] for index in full_units)

        set_probabilities = query.new_empty((0, query.shape[2], sets.positions.shape[-1]))
        if recycled_units[0].numel():
            slots = sets.positions[recycled_units]
            logits = query[recycled_units] @ _gathered(self.key, recycled_units, slots).transpose(-1, -2)
            logits = masked(self.scoring.logits(logits), (slots >= 0)[:, None])
            set_probabilities = logits.softmax(-1)
            weights = self.scoring.weights(set_probabilities, logits, recycled_units[1])
            output[recycled_units] = weights.to(value.dtype) @ _gathered(value, recycled_units, slots)

        return UnitAttention(output, full_units, full_probabilities, recycled_units, set_probabilities)

    def _whole(self, units: UnitIndex) -> Tensor:
        each = zip(self.query[units], _each(self.key, units), strict=True)
        products = [query @ key.transpose(-1, -2) for query, key in each]
        none = self.query.new_empty((0, self.query.shape[2], self.key.shape[2]))
        logits = self.scoring.logits(torch.stack(products) if products else none)
        return masked(logits, None if self.visible is None else self.visible[units[0], None])


def _each(cache: Tensor, units: UnitIndex) -> list[Tensor]:
    """The tokens of each unit, `(tokens, head_dim)`, where they lie: together they would be a copy of the cache."""
    return [cache[row, head] for row, head in zip(*(index.cpu().numpy() for index in units), strict=True)]


def _gathered(cache: Tensor, units: UnitIndex, slots: Tensor) -> Tensor:
    """Tokens of sets, `(n, k, head_dim)`, whatever stands in empty slots."""
    rows, kv_heads, tokens, _ = cache.shape
    places = slots.clamp(min=0)
    if not cache.is_contiguous():
        return cache[units[0][:, None], units[1][:, None], places]
    # By one index whole tokens are copied; by three it is number by number.
    flat = places + ((units[0] * kv_heads + units[1]) * tokens)[:, None]
    found: Tensor = cache.view(rows * kv_heads * tokens, -1).index_select(0, flat.flatten()).unflatten(0, flat.shape)
    return found


@dataclass(frozen=True)
class MaskedSets(StepAttention):
    """All units compute the whole product, and recycled units mask what is not in their set.

    Reads more than `GatheredSets`, but a cache that rows share is read once for all of them.

    Attributes:
        query: `(rows, kv_heads, group, head_dim)`.
        keys: Parts of the cache in order of place, each `(rows or fewer, kv_heads, tokens, head_dim)`; a part with
            fewer rows is shared by all, in turn.
        values: Parts of the same shapes, but for the head size.
        visible: bool `(rows, tokens)`, False at padding; None if there is none.
        scoring: What becomes of query x key.
    """

    query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    visible: Tensor | None
    scoring: Scoring

    def score(self, units: UnitIndex) -> Tensor:
        allowed = None if self.visible is None else self.visible[units[0], None]
        return masked(self._logits()[units], allowed).softmax(-1)

    def attend(self, full: Tensor, sets: RecycledSet, *, scored: bool = True) -> UnitAttention:
        logits = self._logits()
        whole = full[..., None] if self.visible is None else full[..., None] & self.visible[:, None]
        allowed = whole | sets.holds(logits.shape[-1])
        logits = masked(logits, allowed[:, :, None])
        weights = logits.softmax(-1)
        summing = self.scoring.weights(weights, logits).to(self.query.dtype)
        parts = summing.split([part.shape[-2] for part in self.keys], dim=-1)
        products = [_product(weight, part) for weight, part in zip(parts, self.values, strict=True)]
        output = torch.stack(products).sum(0)

        full_units, recycled_units = (full & scored).nonzero(as_tuple=True), (~full).nonzero(as_tuple=True)
        slots = sets.positions[recycled_units][:, None].expand(-1, self.query.shape[2], -1)
        set_probabilities = weights[recycled_units].gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, 0)
        return UnitAttention(output, full_units, weights[full_units], recycled_units, set_probabilities)

    def _logits(self) -> Tensor:
        products = [_product(self.query, part.transpose(-1, -2)) for part in self.keys]
        return self.scoring.logits(torch.cat(products, dim=-1))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` per row and KV head; where all rows share `right`, as one product per KV head.

    Of several right sides row i has that of i modulo their number.
    """
    rows, kv_heads, group, inner = left.shape
    if right.shape[0] == rows:
        return left @ right
    if right.shape[0] > 1:
        in_turn: Tensor = left.unflatten(0, (-1, len(right))) @ right
        return in_turn.flatten(0, 1)
    stacked = left.transpose(0, 1).reshape(kv_heads, rows * group, inner) @ right[0]
    return stacked.view(kv_heads, rows, group, -1).transpose(0, 1)
