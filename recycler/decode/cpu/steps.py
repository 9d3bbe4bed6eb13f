"""Decode steps on the CPU, whoever computes queries, keys and values: decisions, attention, sets, books."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from policies import Schedule, StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import RunningTotals, Totals, keys_only_units, setless_units, tokens_read
from recycler.decode.cpu.arrays import REFRESH_MASS, REFRESH_OVERLAP, Fed, Products
from recycler.decode.cpu.decide import decisions
from recycler.decode.cpu.state import cache_of, first_units, rules_of, scratch_of
from recycler.decode.cpu.walk import attend
from recycler.decode.engine import Decoding
from recycler.decode.first_sets import FirstSets
from recycler.model.attention_hook import refuse_full_window
from recycler.model.threads import kernel_threads


class CpuSteps(Decoding):
    """See `Decoding`.

    Drafts are steps too, of some of the rows, each at its own place, and are in no cache that anybody else sees.

    Args:
        layers: As in `Engine.begin`, like what follows.
        first: As there.
        policy: As there.
        group: Query heads of a KV head.
        float_type: What kernels compute in.
        window: Tokens that the model's layers see; None for all.
        hidden: Width of the residual stream, if kernels compute it; else 0.
        intermediate: The same of the feed-forward layer.

    Attributes:
        caches: Of each layer, as kernels see it.
        units: State of each layer.
        scratch: Room for intermediate results.
        rules: The selection.
        start: int64 `(rows,)`: place of each row's first token.
        n_prompt: Tokens in the prompt's part of the cache.
        n_own: int64 `(rows,)`: tokens of each row since.
        decisions: Who asks the policy.
    """

    def __init__(
        self,
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
        *,
        group: int,
        float_type: type,
        window: int | None,
        hidden: int = 0,
        intermediate: int = 0,
    ) -> None:
        self._layers, self._policy, self._window = layers, policy, window
        # A kernel's array is its own.
        self.start = first.start.copy()
        self.rules = rules_of(first.selection, policy.needs)
        rows, (_, kv_heads) = first.n_rows, first.units
        by_keys, setless = (of(policy, (rows, *first.units)) for of in (keys_only_units, setless_units))
        # A policy that measures new sets wants to know of those that nobody reads too.
        setless = setless & (not self.rules.wants_refresh)
        units = [
            first_units(cached, first, i, by_keys[:, i], setless[:, i], float_type) for i, cached in enumerate(layers)
        ]
        # Layers come first in memory, so that a kernel gets its layer's numbers in one piece.
        self._filled = np.stack([layer.filled for layer in units])
        self.units = [layer._replace(filled=self._filled[i]) for i, layer in enumerate(units)]
        self._full, self._keys_only = np.zeros((2, rows, len(layers), kv_heads), dtype=bool)
        self._tokens_read = np.zeros(self._full.shape)
        part = layers[0].parts[0]
        self.n_prompt, self.n_own = part.prompt.shape[2], np.full(rows, part.n_own)
        self._all_rows, self._every_row = np.arange(rows), np.ones(rows, dtype=bool)
        self._running = RunningTotals(self._full.shape)
        self.decisions = decisions(policy, (len(layers), rows, kv_heads))
        self._keys_only_units = by_keys.copy()
        # Rows that run full whatever the policy says, bool `(rows,)`; None for none.
        self._led: np.ndarray | None = None
        self.begin_schedule(first.measured_mass(policy.needs).numpy().swapaxes(0, 1))
        self._sizes = group, float_type, hidden, intermediate
        self._refer_to_memory()

    @property
    def full(self) -> np.ndarray:
        return self._full

    @property
    def keys_only(self) -> np.ndarray:
        return self._keys_only

    @property
    def tokens_read(self) -> np.ndarray:
        return self._tokens_read

    def totals(self) -> Totals:
        return self._running.totals()

    def begin_schedule(self, masses: np.ndarray | None = None) -> None:
        """Begin the schedule; with recovered masses of the sets, float64 `(rows, layers, kv_heads)`, if they count."""
        self._schedule = Schedule(np.zeros(self._full.shape), masses)

    def sets_after(self, first: FirstSets) -> FirstSets:
        """The sets as they are, for another decoding to begin from; recovered masses are NaN.

        Args:
            first: What this one began from.
        """
        positions = np.stack([units.positions for units in self.units])
        empty = np.arange(positions.shape[-1]) >= self._filled[..., None]
        return dataclasses.replace(
            first,
            positions=torch.from_numpy(np.where(empty, -1, positions)),
            scores=torch.from_numpy(np.stack([units.scores for units in self.units])),
            query=torch.from_numpy(np.stack([units.full_query for units in self.units])),
            mass=torch.full_like(first.mass, float("nan")),
            end=self.n_prompt + int(self.n_own.max()),
        )

    def run_full(self, rows: Tensor) -> None:
        self._led = led = rows.numpy() if self._led is None else self._led | rows.numpy()
        self._keys_only_units[led] = False
        for units in self.units:
            units.by_keys[led] = False

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        with self.kernels() as n_threads:
            logits = self.take(tokens, places, self._every_row, n_threads)
        for layer in self._layers:
            for part in layer.parts:
                part.n_own += 1
        return logits

    def kernels(self) -> AbstractContextManager[int]:
        """What is held during a step, and how many threads there are."""
        return kernel_threads()

    def take(self, tokens: Tensor, places: Tensor, going: np.ndarray, n_threads: int) -> Tensor:
        """A step of the rows that are `going`, bool `(rows,)`; the cache does not show it."""
        # What rows that take no part write needs room too, and is looked at by nobody.
        self.make_room(int(self.n_own.max()) + 1, int((self.n_own + going).max()))
        fed, seen_own = Fed(self._all_rows, self.n_own), np.where(going, self.n_own + 1, 0)
        self.decisions.begin_step(self._schedule, tokens.numpy()[:, None, None])
        logits = self.through_layers(tokens, places, fed, seen_own, n_threads)
        # Last of all: after an interrupt before the first layer the same token may be fed again.
        self._end_step(going)
        return logits

    @abstractmethod
    def through_layers(self, tokens: Tensor, places: Tensor, fed: Fed, seen_own: np.ndarray, n_threads: int) -> Tensor:
        """Logits of a step; every layer's queries and similarities are computed, and then `attend` is called.

        Args:
            tokens: As in `step`, like what follows.
            places: As there.
            fed: Where keys and values go.
            seen_own: int64 `(rows,)`: own tokens that each row sees.
            n_threads: Threads to use.
        """

    def attend(self, layer: int, products: Products, seen_own: np.ndarray, n_threads: int) -> None:
        """Decide for a layer and attend, into `scratch.attended`."""
        asked = self.decisions
        asked.decide(layer)
        if self._led is not None:
            asked.full[layer][self._led] = True
        state = self.units[layer], asked.signals[layer], self.rules, self.scratch
        attend(asked.full[layer], products, self.start, self.caches[layer], seen_own, *state, n_threads)

    def make_room(self, most_own: int, most_seen: int) -> None:
        """Make room in the cache for so many tokens of each row since the prompt.

        Args:
            most_own: How many.
            most_seen: How many of them a row attends to at most.

        Raises:
            ValueError: If the model's layers do not see as many.
        """
        refuse_full_window(0, self.n_prompt + most_seen, self._window)
        grown = [part.make_room(most_own) for layer in self._layers for part in layer.parts]
        if any(grown):
            self._refer_to_memory()

    def _end_step(self, going: np.ndarray) -> None:
        """Write down what was done, and let the schedule go on by one."""
        self.n_own = self.n_own + going
        asked, needs = self.decisions, self._policy.needs
        of_going = going[:, None, None]
        self._full = asked.full.swapaxes(0, 1) & of_going
        self._keys_only = self._full & self._keys_only_units
        held, in_set = (self.n_prompt + self.n_own - self.start)[:, None, None], self._filled.swapaxes(0, 1)
        self._tokens_read = tokens_read(self._full, self.keys_only, held, in_set) * of_going
        reasons = {reason: noted.swapaxes(0, 1) & of_going for reason, noted in asked.reasons.items()}
        self._running.add(self._full, self.keys_only, self._tokens_read, reasons)
        mass, overlap = (asked.signals[:, :, which].swapaxes(0, 1) for which in (REFRESH_MASS, REFRESH_OVERLAP))
        self._schedule.advance(
            self._full,
            mass if "refresh_mass" in needs else None,
            overlap if "refresh_overlap" in needs else None,
        )

    def _refer_to_memory(self) -> None:
        """Point the kernels at the cache's tokens, and make their own room as large; after every growth."""
        self.caches = [cache_of(*layer.parts) for layer in self._layers]
        places = self.caches[0].prompt_key.shape[2] + self.caches[0].own_key.shape[2]
        group, float_type, hidden, intermediate = self._sizes
        self.scratch = scratch_of(self.units[0], group, places, float_type, hidden, intermediate)
