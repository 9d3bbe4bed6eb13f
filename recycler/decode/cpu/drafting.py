"""Drafts on the CPU engine, and their verification: one reading of weights and cache for all tokens of all rows."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recycler.decode.counts import Totals
from recycler.decode.cpu import dense
from recycler.decode.cpu.arrays import Array, Fed, Scratch
from recycler.decode.cpu.many import ALL_VOTE, Asking, ManyScratch, attend_many, many_scratch
from recycler.decode.cpu.votes import choose_by_votes
from recycler.decode.engine import Drafting, refuse_measured_sets
from recycler.decode.first_sets import FirstSets
from recycler.model.threads import kernel_threads

if TYPE_CHECKING:
    from recycler.decode.cpu.engine import CpuDecoding

# Tokens of a row that are read again at once. Their queries' sums stay in a core's first cache; of more they do not.
MOST_AT_ONCE = 32
# Similarities of tokens that are verified are nobody's signals.
_NO_SIGNALS = np.zeros((1, 1, 1))


class CpuDrafting(Drafting):
    """See `Drafting`.

    Args:
        steps: Takes the drafts' steps.
        needs: Signals that the policy reads.

    Raises:
        NotCovered: If the policy reads what a verification does not measure of the sets that it chooses.
    """

    def __init__(self, steps: CpuDecoding, needs: Set[str]) -> None:
        refuse_measured_sets(needs)
        self._steps = steps
        rows, kv_heads = len(steps.start), steps.units[0].filled.shape[1]
        # Tokens of each row since the prompt that its last round left, and whether there was one.
        self._held, self._has_voted = steps.n_own.copy(), np.zeros(rows, dtype=bool)
        # Of each row's last verification: mean queries, `(layers, rows, tokens, kv_heads, head_dim)`; and what the next
        # sets are chosen by, `(layers, rows, kv_heads, places)`.
        self._queries = np.zeros((len(steps.units), rows, 0, *steps.units[0].full_query.shape[1:]))
        self._votes = np.zeros((len(steps.units), rows, kv_heads, 0), dtype=np.float32)
        self._many: ManyScratch | None = None
        self._n_voters = ALL_VOTE
        self._rules = steps.rules._replace(
            wants_query_similarity=False, wants_step_similarity=False, wants_layer_similarity=False
        )

    def begin_round(self, n_own: np.ndarray, going: np.ndarray) -> None:
        steps = self._steps
        # Below 1 where a row that had run ahead of its text goes back further than its last round.
        n_kept = n_own - self._held
        self._held = np.where(going, n_own, self._held)
        # What a row that takes no part writes meanwhile lies past what it holds.
        steps.n_own = n_own.copy()
        steps.begin_schedule()
        chosen = going & self._has_voted
        if not chosen.any():
            return
        ends = np.where(chosen, steps.n_prompt + n_own, 0)
        rows = np.flatnonzero(chosen)
        with kernel_threads() as n_threads:
            for units, votes, queries in zip(steps.units, self._votes, self._queries, strict=True):
                choose_by_votes(votes, steps.start, ends, units, steps.rules, steps.scratch, n_threads)
                units.full_query[rows] = units.last_query[rows] = queries[rows, n_kept[rows].clip(1) - 1]

    def draft(self, tokens: Tensor, places: Tensor, going: np.ndarray) -> Tensor:
        with kernel_threads() as n_threads:
            return self._steps.take(tokens, places, going, n_threads)

    def verify(self, tokens: Tensor, places: Tensor, rows: np.ndarray) -> Tensor:
        steps = self._steps
        n = np.bincount(rows, minlength=len(self._held))
        first = np.cumsum(n) - n
        fed = Fed(rows, self._held[rows] + np.arange(len(rows)) - first[rows])
        most = int((self._held + n).max())
        steps.make_room(most, most)
        scratch = self._scratch(len(rows))
        x, cosine, sine = steps.embedded(tokens, places)
        asked = first, n, self._held, scratch.query, scratch.attended
        with kernel_threads() as n_threads:
            many = self._scratch_of_many(int(n.max()), n_threads)
            layers = zip(steps.weights, steps.caches, steps.units, self._votes, self._queries, strict=True)
            for weights, cache, units, votes, queries in layers:
                where = cosine, sine, cache, fed, units
                dense.project(x, weights, *where, _NO_SIGNALS, self._rules, scratch, n_threads)
                asking = Asking(*asked, votes, self._n_voters)
                attend_many(asking, weights.scaling, steps.start, cache, self._rules, many, n_threads)
                dense.feed(x, weights, scratch, n_threads)
                queries[rows, fed.own - self._held[rows]] = scratch.unit_query
            self._has_voted = self._has_voted | (n > 0)
            return steps.predicted(x, scratch, n_threads)

    def repeat(self, first: FirstSets, tokens: Tensor, places: Tensor) -> tuple[Tensor, FirstSets]:
        """As `Engine.repeat`, in rounds without a draft."""
        rows, n = tokens.shape
        self._held, self._n_voters = self._held - n, first.selection.prompt_queries or ALL_VOTE
        self._steps.n_own = self._held.copy()
        logits = []
        # The last round has all that vote.
        for end in range((n - 1) % MOST_AT_ONCE + 1, n + 1, MOST_AT_ONCE):
            some = slice(max(end - MOST_AT_ONCE, 0), end)
            n_some = end - some.start
            fed = tokens[:, some].reshape(-1), places[:, some].reshape(-1)
            verified = self.verify(*fed, np.arange(rows).repeat(n_some))
            logits.append(verified.unflatten(0, (rows, n_some)))
            self.begin_round(self._held + n_some, np.ones(rows, dtype=bool))
        return torch.cat(logits, 1), self._steps.sets_after(first)

    def totals(self) -> Totals:
        return self._steps.totals()

    def _scratch(self, n_tokens: int) -> Scratch:
        """Room for what is not attention, as for so many rows."""
        of_rows = self._steps.scratch

        def room(like: Array) -> Array:
            return np.empty((n_tokens, *like.shape[1:]), dtype=like.dtype)

        return of_rows._replace(
            **{
                name: room(getattr(of_rows, name))
                for name in ("normed", "projected", "query", "unit_query", "attended", "gate", "up")
            }
        )

    def _scratch_of_many(self, n_queries: int, n_threads: int) -> ManyScratch:
        """Room for the attention and what it leaves: for as many places as the cache has room for."""
        query = self._steps.scratch.query
        rows, kv_heads, group, head_dim = query.shape
        places, n_kept, most = self._steps.scratch.found.shape[1], self._votes.shape[3], self._queries.shape[2]
        if self._many is None or places > n_kept or n_queries > most or n_threads > len(self._many.packed):
            votes, self._votes = self._votes, np.zeros((*self._votes.shape[:3], places), dtype=np.float32)
            self._votes[..., :n_kept] = votes
            queries, most = self._queries, max(n_queries, most)
            self._queries = np.zeros((*queries.shape[:2], most, *queries.shape[3:]), dtype=query.dtype)
            self._queries[:, :, : queries.shape[2]] = queries
            sizes = n_threads, rows * kv_heads, most, group, head_dim, places
            self._many = many_scratch(*sizes, query)
        return self._many
