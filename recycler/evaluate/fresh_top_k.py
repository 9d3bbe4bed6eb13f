"""The ceiling of every schedule: a new set at every step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from policies import Selection
from recycler.evaluate.token_selector import Chosen, TokenSelector
from recycler.sets.recycled_set import select, unit_sizes
from recycler.sets.scores import probabilities, token_scores


@dataclass(frozen=True)
class FreshTopK(TokenSelector):
    """The set that a full step would choose now, and attention to nothing else.

    No schedule with the same selection can do better than by chance. It is no method to run: it reads all keys.

    Attributes:
        selection: How sets are chosen.
    """

    selection: Selection

    def choose(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> Chosen:
        tokens, group = key.shape[1], query.shape[1]
        weights = probabilities(query @ key.transpose(-1, -2) * scaling, None)
        sizes = unit_sizes(self.selection, layer, key.device)
        chosen = select(token_scores(weights, self.selection), self.selection, 0, tokens, sizes)
        allowed = chosen.holds(tokens)[:, None].expand(-1, group, -1)
        return Chosen(allowed, (tokens + chosen.filled.sum(-1)).double() / 2)
