"""The recycled set of a unit: chosen at a full step, kept up to date in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from policies import Selection

# Row and KV head of each of some units, as indices.
UnitIndex = tuple[Tensor, ...]

# Rank of a token that must stay, above that of any score.
STAYS = torch.iinfo(torch.int64).max
# Rank of an empty slot, below that of any score.
EMPTY = -1
# Score of a token that arrived after the last full step where steps give none: it ranks above all known ones.
_UNSCORED = float("inf")


@dataclass
class RecycledSet:
    """At most k tokens for each of some units.

    Attributes:
        positions: int64 `(..., k)`, places in the cache; -1 marks an empty slot. In no order.
        scores: float32 `(..., k)`, the scores by which tokens leave; infinite for tokens not scored yet.
        selection: The settings it was chosen with.
        sizes: int64, broadcastable to `(..., 1)`: slots that each set may use, the first ones; None for all of them.
    """

    positions: Tensor
    scores: Tensor
    selection: Selection
    sizes: Tensor | None = None

    @property
    def filled(self) -> Tensor:
        """bool `(..., k)`: slots that hold a token."""
        return self.positions >= 0

    def admit(self, position: Tensor | int, start: Tensor | int) -> Tensor:
        """Take in the token that has just arrived; in a full set the lowest leaves.

        Sinks and the window, which has moved on by one, never leave. Of two equal scores the older token leaves.

        Args:
            position: Place of the new token, an int or `(..., 1)`.
            start: Place of the row's first token, an int or `(..., 1)`.

        Returns:
            int64 `(..., 1)`: place of the token that left, -1 where a slot was empty.
        """
        selection = self.selection
        stays = (self.positions < start + selection.sinks) | (self.positions > position - selection.window)
        rank = ranks(self.scores, self.positions).masked_fill_(stays, STAYS).masked_fill_(~self.filled, EMPTY)
        slot = self.close(rank).argmin(-1, keepdim=True)
        left = self.positions.gather(-1, slot)
        arrived = torch.as_tensor(position, device=left.device).expand_as(left)
        self.positions = self.positions.scatter(-1, slot, arrived)
        unscored = _UNSCORED if selection.score_kept is None else 0.0
        self.scores = self.scores.scatter(-1, slot, unscored)
        return left

    def close(self, rank: Tensor) -> Tensor:
        """Rank slots that a set may not use above all others, in place; `(..., k)`."""
        if self.sizes is None:
            return rank
        return rank.masked_fill_(torch.arange(rank.shape[-1], device=rank.device) >= self.sizes, STAYS)

    def holds(self, n_tokens: int) -> Tensor:
        """bool `(..., n_tokens)`: which places of the cache are in the set."""
        mask = self.positions.new_zeros((*self.positions.shape[:-1], n_tokens + 1), dtype=torch.bool)
        # Empty slots write to a last place that is cut off.
        places = self.positions.masked_fill(~self.filled, n_tokens)
        return mask.scatter_(-1, places, True)[..., :-1]

    def recovered_mass(self, probabilities: Tensor) -> Tensor:
        """Attention on the set, in [0, 1], mean over the group: `(..., group, tokens)` to `(...)`."""
        return (probabilities.mean(-2) * self.holds(probabilities.shape[-1])).sum(-1)


def unit_sizes(selection: Selection, layer: int, device: torch.device) -> Tensor | None:
    """Most tokens of the set of each KV head of a layer, int64 `(kv_heads, 1)`; None if all have `k`."""
    if selection.unit_k is None:
        return None
    return torch.tensor(selection.unit_k[layer], device=device)[:, None]


def select(
    scores: Tensor, selection: Selection, start: Tensor | int, end: Tensor | int, sizes: Tensor | None = None
) -> RecycledSet:
    """Choose a set: sinks, window, and the top-scoring rest.

    Args:
        scores: `(..., tokens)`, at least 0. Compared in float32; of two equal scores the later token is taken.
        selection: Settings.
        start: Place of the row's first token (after left padding), an int or `(..., 1)`.
        end: One past the row's last token, an int or `(..., 1)`.
        sizes: Most tokens of each set, broadcastable to `(..., 1)`; None for `k`.

    Returns:
        A set of `min(size, end - start)` tokens.
    """
    n_tokens = scores.shape[-1]
    place = torch.arange(n_tokens, device=scores.device)
    scores = scores.float()
    rank = ranks(scores, place)
    rank = rank.masked_fill_((place < start + selection.sinks) | (place >= end - selection.window), STAYS)
    rank = rank.masked_fill_((place < start) | (place >= end), EMPTY)
    # Sorted where a smaller set is the beginning of a larger one.
    best, positions = rank.topk(min(selection.widest, n_tokens), sorted=sizes is not None)
    chosen_scores = scores.gather(-1, positions)
    positions = positions.masked_fill(best == EMPTY, -1)
    if sizes is not None:
        positions = positions.masked_fill(torch.arange(positions.shape[-1], device=scores.device) >= sizes, -1)
    missing = selection.widest - positions.shape[-1]
    return RecycledSet(pad(positions, (0, missing), value=-1), pad(chosen_scores, (0, missing)), selection, sizes)


def ranks(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 order of (score, position): the bits of a float that is not negative sort as the float does."""
    bits = scores.view(torch.int32).to(torch.int64)
    return bits.bitwise_left_shift_(32).bitwise_or_(positions.clamp(min=0))
