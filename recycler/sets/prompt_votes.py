"""Several queries of a prompt that choose the first set together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from recycler.sets.scores import Scoring, probabilities

# Queries whose attention is alive at once: what a chunk of a long prompt would take at once is gigabytes.
_QUERIES_AT_ONCE = 256


class PromptVotes:
    """Attention of the last queries of a prompt, summed, while a layer reads it in chunks.

    Args:
        n_queries: How many queries vote, at least 1; None for all of them.
    """

    def __init__(self, n_queries: int | None) -> None:
        self._n_queries = n_queries
        self._end = 0
        self._queries: Tensor | None = None
        self._votes: Tensor | None = None

    def see(self, query: Tensor, key: Tensor, visible: Tensor | None, scoring: Scoring) -> Tensor:
        """Take in a chunk; a chunk that does not follow the one before begins a new prompt.

        Args:
            query: `(rows, kv_heads, group, n, head_dim)`, those of the last n places of the cache.
            key: `(rows, kv_heads, tokens, head_dim)`, the whole cache.
            visible: bool `(rows, tokens)`, False at padding, which neither votes nor is voted for; None if there is
                none.
            scoring: What becomes of query x key.

        Returns:
            `(rows, kv_heads, group, tokens)`: the sum over the voting queries seen so far, in float32 or the precision
            of the model if that is higher.
        """
        end, n = key.shape[2], query.shape[3]
        follows = self._queries is not None and self._end + n == end and len(self._queries) == len(query)
        self._end = end
        if self._n_queries is not None:
            # Who votes is known at the end only: the last queries are kept, and vote anew after each chunk.
            last = query[..., -self._n_queries :, :]
            if follows and self._queries is not None:
                last = torch.cat([self._queries, last], dim=3)[..., -self._n_queries :, :]
            # A copy: a part of the prompt's queries would keep all of them alive, twice the size of the KV cache.
            self._queries = last.clone()
            return _summed(self._queries, key, visible, scoring)
        self._queries = query[..., :0, :].clone()
        votes = _summed(query, key, visible, scoring)
        if follows and self._votes is not None:
            votes = votes + pad(self._votes, (0, end - self._votes.shape[-1]))
        self._votes = votes
        return votes


def _summed(query: Tensor, key: Tensor, visible: Tensor | None, scoring: Scoring) -> Tensor:
    """Causal attention of the queries of the last places, summed over them."""
    n, end = query.shape[3], key.shape[2]
    precision = torch.promote_types(query.dtype, torch.float32)
    votes = query.new_zeros((*query.shape[:3], end), dtype=precision)
    for begin in range(0, n, _QUERIES_AT_ONCE):
        some = query[..., begin : begin + _QUERIES_AT_ONCE, :]
        first, n_some = end - n + begin, some.shape[3]
        n_seen = first + n_some
        places = torch.arange(first, n_seen, device=key.device)
        # The group beside the queries: else keys would be copied for each of its heads.
        products = some.flatten(2, 3) @ key[:, :, :n_seen].transpose(-1, -2)
        logits = scoring.logits(products.unflatten(2, some.shape[2:4]))
        # What comes before the first of these queries is visible to all of them.
        logits[..., first:].masked_fill_(places > places[:, None], float("-inf"))
        weights = probabilities(logits, None if visible is None else visible[:, None, None, None, :n_seen])
        if visible is not None:
            # A padding query sees nothing: its softmax is NaN.
            weights = weights.masked_fill_(~visible[:, None, None, places, None], 0)
        votes[..., :n_seen] += weights.sum(3)
    return votes
