"""Drafts on a GPU, and their verification: each of them one launch."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recycler.decode import modes
from recycler.decode.counts import Totals
from recycler.decode.cuda.arrays import Cached
from recycler.decode.cuda.step_graph import StepGraph, on_gpu, stream_for
from recycler.decode.cuda.verification import Remembered, Verification
from recycler.decode.engine import Drafting, refuse_measured_sets

if TYPE_CHECKING:
    from recycler.decode.cuda.engine import CudaDecoding


class CudaDrafting(Drafting):
    """See `Drafting`.

    Nothing here waits for the GPU: how many tokens rows hold, and which of them go on, is known on the host.

    Args:
        steps: Takes the drafts' steps.
        needs: Signals that the policy reads.

    Raises:
        NotCovered: If the policy reads what a verification does not measure of the sets that it chooses.
    """

    def __init__(self, steps: CudaDecoding, needs: Set[str]) -> None:
        refuse_measured_sets(needs)
        self._steps = steps
        rows, device = steps.sizes.rows, steps.state.start.device
        self._device = device
        # Tokens of each row since the prompt that its last round left, and that it has now, drafts included.
        self._held, self._n_own = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        self._going, self._has_voted = np.ones(rows, dtype=bool), np.zeros(rows, dtype=bool)
        self._verification: Verification | None = None
        # Of a round that begins: tokens that hold, rows that take part, those with new sets, whose query is theirs.
        self._begun = torch.zeros((4, rows), dtype=torch.int32, device=device)
        self._last_kept = torch.zeros(rows, dtype=torch.int32, device=device)
        self._modes = torch.zeros(steps.sizes.units, dtype=torch.int8, device=device)
        self._every_row = torch.arange(rows, device=device)
        self._graph = self._new_graph()

    def begin_round(self, n_own: np.ndarray, going: np.ndarray) -> None:
        # Below 1 where a row that had run ahead of its text goes back further than its last round.
        n_kept = n_own - self._held
        self._held = np.where(going, n_own, self._held)
        # What rows that take no part hold meanwhile is looked at by nobody.
        self._n_own, self._going = n_own.copy(), going.copy()
        begun = np.stack([n_own, going, going & self._has_voted, n_kept.clip(1) - 1]).astype(np.int32)
        with on_gpu(self._device), torch.inference_mode():
            self._begun.copy_(torch.from_numpy(begun), non_blocking=True)
            self._run(self._graph, self._begin)

    def draft(self, tokens: Tensor, places: Tensor, going: np.ndarray) -> Tensor:
        steps = self._steps
        with on_gpu(self._device):
            if (going != self._going).any():
                self._going = going.copy()
                steps.state.going.copy_(torch.from_numpy(going.astype(np.int32)), non_blocking=True)
            most = int((self._n_own + going).max())
            self._make_room(most, most)
            logits = steps.take(tokens, places)
        self._n_own = self._n_own + going
        return logits

    def verify(self, tokens: Tensor, places: Tensor, rows: np.ndarray) -> Tensor:
        n = np.bincount(rows, minlength=len(self._held))
        in_row = np.arange(len(rows)) - (np.cumsum(n) - n)[rows]
        with on_gpu(self._device):
            queries = max(int(n.max()), self._verification.queries if self._verification is not None else 0)
            # What is verified beside a row's tokens, so that all rows have as many, lies past them.
            self._make_room(int(self._held.max()) + queries, int((self._held + n).max()))
            verification = self._wide_enough(queries)
            at = torch.from_numpy(rows * queries + in_row).to(self._device, non_blocking=True)
            with torch.inference_mode():
                verification.ask(tokens, places, at, self._held, n)
                self._run(verification.graph, verification.take)
                logits = verification.logits[at]
        self._has_voted = self._has_voted | (n > 0)
        return logits

    def totals(self) -> Totals:
        return self._steps.totals()

    def _begin(self) -> None:
        """All that happens on the GPU when a round begins."""
        steps, verified = self._steps, self._verification
        n_own, going, chosen, query = self._begun
        steps.state.n_own.copy_(n_own)
        steps.state.going.copy_(going)
        steps.state.begin_schedule()
        if verified is None:
            return
        picked = verified.remembered.queries[:, self._every_row, query.long()]
        for kept in (steps.state.full_query, steps.state.last_query):
            kept.copy_(torch.where(chosen[:, None, None] != 0, picked, kept))
        self._modes.copy_((chosen * modes.FULL).repeat_interleave(steps.sizes.kv_heads, output_size=len(self._modes)))
        self._last_kept.copy_(n_own - 1)
        cached = Cached(steps.state.start, self._last_kept, going)
        for kernels, votes in zip(steps.kernels, verified.remembered.votes, strict=True):
            kernels.choose_by_votes(votes, self._modes, cached)

    def _make_room(self, most_own: int, most_seen: int) -> None:
        """Make room, and follow the kernels if they moved: what is remembered stays."""
        scratch = self._steps.scratch
        self._steps.make_room(most_own, most_seen)
        if self._steps.scratch is not scratch and self._verification is not None:
            self._verify_with(self._verification.queries)

    def _wide_enough(self, queries: int) -> Verification:
        verification = self._verification
        if verification is None or verification.queries < queries:
            verification = self._verify_with(queries)
        return verification

    def _verify_with(self, queries: int) -> Verification:
        steps = self._steps
        before = None if self._verification is None else self._verification.remembered
        if self._verification is not None:
            for graph in (self._graph, self._verification.graph):
                if graph is not None:
                    graph.forget()
        with torch.inference_mode(False):
            remembered = Remembered.of(steps.sizes, queries, steps.scratch.places, self._device, before)
            self._verification = Verification(steps, queries, remembered, self._new_graph())
        self._graph = self._new_graph()
        return self._verification

    def _new_graph(self) -> StepGraph | None:
        stream = stream_for(self._device, "step") if self._steps.machine.captures else None
        return None if stream is None else StepGraph(stream)

    def _run(self, graph: StepGraph | None, what: Callable[[], None]) -> None:
        if graph is None:
            what()
        else:
            graph(what)
