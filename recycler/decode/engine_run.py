"""Decode steps of a model on an engine, behind the model's own forward."""

from __future__ import annotations

from collections.abc import Collection, Set

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from policies import StepPolicy
from recycler.decode.cache import growing_layers
from recycler.decode.cache_watch import CACHE_CHANGED, other_padding
from recycler.decode.counts import dense_tokens
from recycler.decode.engine import Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.forward_call import ForwardCall
from recycler.decode.passing_layers import beside_recycled
from recycler.decode.tally import Tally
from recycler.model.decoder_parts import NotCovered

NO_PLACES = "the call passes no position_ids, and how the model counts is its own"
# Steps between two looks at what a device has noted of the padding.
_STEPS_BETWEEN_LOOKS = 64


class EngineRun:
    """The decode steps after one prompt.

    Args:
        engine: What runs them.
        call: The first of them.
        policy: Who decides.
        first: What the prompt left behind.
        recycled: Indices of the recycled layers.

    Raises:
        NotCovered: If the engine does not run them.
        ValueError: If the cache is not the one that prefill filled.
    """

    def __init__(
        self, engine: Engine, call: ForwardCall, policy: StepPolicy, first: FirstSets, recycled: Collection[int]
    ) -> None:
        cache = call.arguments.get("past_key_values")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise NotCovered(f"it runs a DynamicCache, and this is a {type(cache).__name__}")
        call.check()
        if cache is None:
            raise ValueError(CACHE_CHANGED)
        places = call.arguments.get("position_ids")
        if places is not None and places.dim() != 2:
            raise NotCovered("position_ids are not one number per row and token")
        self._needs_places = not engine.counts_tokens
        if self._needs_places and places is None:
            raise NotCovered(NO_PLACES)
        rows = len(call.tokens)
        self._start = first.start
        self._device = call.tokens.device
        if cache.get_seq_length() != first.end or len(self._start) != rows:
            raise ValueError(CACHE_CHANGED)
        before = list(cache.layers)
        try:
            self._layers = growing_layers(cache, recycled)
        except TypeError as error:
            raise NotCovered(f"the cache has a {error}") from error
        self._cache = cache
        self._revisions = [layer.revision for layer in self._layers]
        self._n_tokens = first.end
        self.engine = engine.name
        self._engine, self._first = engine, first
        self._dtype = self._layers[0].dtype
        self._n_prompt = self._n_tokens
        self._mask: Tensor | None = None
        passing = None if len(recycled) == len(cache.layers) else beside_recycled(cache, recycled, first.end)
        try:
            self.decoding = engine.begin(self._layers, first, policy, passing)
        except NotCovered:
            cache.layers[:] = before
            raise

    def add_to(self, tally: Tally) -> None:
        """Tell what was done so far.

        Raises:
            ValueError: If the padding changed where that was not looked at yet.
        """
        n_steps = self._n_tokens - self._n_prompt
        if n_steps:
            if self._device.type != "cpu":
                self._refuse_other_padding(self._mask, self._n_tokens)
            tokens_dense = dense_tokens(self._start, self._n_prompt, n_steps)
            tally.add_run(self.engine, n_steps, tokens_dense, self.decoding.totals(), self.decoding.rounds)

    def run_full(self, rows: Tensor) -> None:
        """Run rows, bool `(rows,)`, full from the next step on."""
        self.decoding.run_full(rows)

    def repeats(self, needs: Set[str]) -> bool:
        """Whether its last steps may be repeated; `needs` are signals that the policy reads.

        Where it may not, the model's own forward reads them again: it measures new sets, and lets any query vote.
        """
        n_voters = self._first.selection.prompt_queries
        return "refresh_mass" not in needs and n_voters is not None and n_voters <= self._engine.most_voters

    def repeat(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        """Read the tokens of the last steps again, all at once, with full attention, whose keys and values they get.

        Args:
            tokens: int64 `(rows, n)`.
            places: int64 `(rows or 1, n)`: their positions, if calls passed them.

        Returns:
            Logits `(rows, n, vocabulary)`.
        """
        if places is None:
            places = torch.arange(self._n_tokens - tokens.shape[1], self._n_tokens)[None]
        places = places.expand(tokens.shape)
        logits, self._first = self._engine.repeat(self._layers, self._first, tokens, places)
        return logits.to(self._dtype)

    def begin_again(self, policy: StepPolicy) -> None:
        """Go on as after a prompt, from what was repeated; what was done before has been told."""
        self._n_prompt = self._n_tokens
        self.decoding = self._engine.begin(self._layers, self._first, policy)

    def step(self, call: ForwardCall) -> CausalLMOutputWithPast:
        """Take a step.

        Raises:
            ValueError: If the call is none that the engine covers, or the cache or the padding changed.
        """
        try:
            call.check()
        except NotCovered as reason:
            raise ValueError(
                f"a decode step cannot leave the {self.engine} engine, and {reason}: use recycled(..., fast=False)."
            ) from reason
        self._follow(call)
        places = call.arguments.get("position_ids")
        if places is None and self._needs_places:
            raise ValueError(f"{NO_PLACES}: pass them at every step, or use recycled(..., fast=False).")
        if places is None:
            places = torch.full((1, 1), self._n_tokens, device=call.tokens.device)
        with torch.no_grad():
            logits = self.decoding.step(call.tokens[:, 0], places[:, -1])
        self._n_tokens += 1
        return CausalLMOutputWithPast(logits=logits[:, None].to(self._dtype), past_key_values=self._cache)

    def _follow(self, call: ForwardCall) -> None:
        same = call.arguments.get("past_key_values") is self._cache and len(call.tokens) == len(self._start)
        revisions = [layer.revision for layer in self._layers]
        if not same or revisions != self._revisions or self._layers[0].get_seq_length() != self._n_tokens:
            raise ValueError(CACHE_CHANGED)
        mask = call.arguments.get("attention_mask")
        # Looking at a device makes it wait. A mask holds all of its past, so there it is looked at now and then, and
        # before anything is told.
        if self._device.type == "cpu" or (self._n_tokens - self._n_prompt) % _STEPS_BETWEEN_LOOKS == 0:
            self._refuse_other_padding(mask, self._n_tokens + 1)
        self._mask = mask

    def _refuse_other_padding(self, mask: Tensor | None, n_tokens: int) -> None:
        """Raise unless the visible tokens of every row, out of so many, are those from the row's first one on."""
        rows = len(self._start)
        if mask is None:
            wrong = self._start > 0
        elif mask.shape != (rows, n_tokens):
            wrong = np.ones(rows, dtype=bool)
        else:
            seen = mask != 0
            # As many visible tokens as there are from the first one on: then none of those is masked.
            first, n_seen = seen.to(torch.uint8).argmax(-1).cpu().numpy(), seen.sum(-1).cpu().numpy()
            wrong = (n_seen != n_tokens - self._start) | (first != self._start)
        if wrong.any():
            raise ValueError(other_padding(int(wrong.argmax())))
