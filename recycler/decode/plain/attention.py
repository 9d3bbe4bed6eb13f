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
        full: The units that attended to the whole cache.
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
    def attend(self, full: Tensor, sets: RecycledSet) -> UnitAttention:
        """Attention of all units.

        Args:
            full: bool `(rows, kv_heads)`: units that attend to the whole cache; the others attend to their sets.
            sets: Sets of all units.
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
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    scoring: Scoring

    def score(self, units: UnitIndex) -> Tensor:
        return self._whole(units).softmax(-1)

    def attend(self, full: Tensor, sets: RecycledSet) -> UnitAttention:
        query, key, value = self.query, self.key, self.value
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))

        full_units = full.nonzero(as_tuple=True)
        logits = self._whole(full_units)
        full_probabilities = logits.softmax(-1)
        weights = self.scoring.weights(full_probabilities, logits, full_units[1])
        output[full_units] = weights.to(value.dtype) @ value[full_units]

        recycled_units = (~full).nonzero(as_tuple=True)
        slots = sets.positions[recycled_units]
        places = (recycled_units[0][:, None], recycled_units[1][:, None], slots.clamp(min=0))
        logits = self.scoring.logits(query[recycled_units] @ key[places].transpose(-1, -2))
        logits = masked(logits, (slots >= 0)[:, None])
        set_probabilities = logits.softmax(-1)
        weights = self.scoring.weights(set_probabilities, logits, recycled_units[1])
        output[recycled_units] = weights.to(value.dtype) @ value[places]

        return UnitAttention(output, full_units, full_probabilities, recycled_units, set_probabilities)

    def _whole(self, units: UnitIndex) -> Tensor:
        logits = self.scoring.logits(self.query[units] @ self.key[units].transpose(-1, -2))
        return masked(logits, None if self.visible is None else self.visible[units[0], None])


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

    def attend(self, full: Tensor, sets: RecycledSet) -> UnitAttention:
        logits = self._logits()
        whole = full[..., None] if self.visible is None else full[..., None] & self.visible[:, None]
        allowed = whole | sets.holds(logits.shape[-1])
        logits = masked(logits, allowed[:, :, None])
        weights = logits.softmax(-1)
        summing = self.scoring.weights(weights, logits).to(self.query.dtype)
        parts = summing.split([part.shape[-2] for part in self.keys], dim=-1)
        products = [_product(weight, part) for weight, part in zip(parts, self.values, strict=True)]
        output = torch.stack(products).sum(0)

        full_units, recycled_units = full.nonzero(as_tuple=True), (~full).nonzero(as_tuple=True)
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
