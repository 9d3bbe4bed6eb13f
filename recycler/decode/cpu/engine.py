"""The decoder on CPU: kernels compiled by numba, decisions on NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import Schedule, StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.counts import RunningTotals, Totals, keys_only_units, setless_units, tokens_read
from recycler.decode.cpu import dense
from recycler.decode.cpu.arrays import REFRESH_MASS, REFRESH_OVERLAP, Array, Fed, LayerWeights, Scratch
from recycler.decode.cpu.decide import decisions
from recycler.decode.cpu.drafting import CpuDrafting
from recycler.decode.cpu.state import as_array, cache_of, first_units, layer_weights, rules_of, scratch_of, weight_array
from recycler.decode.cpu.walk import attend
from recycler.decode.engine import Decoding, Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.token_ids import check_tokens
from recycler.model.attention_hook import refuse_full_window
from recycler.model.decoder_parts import DecoderParts, NotCovered, bias_of, decoder_parts
from recycler.model.threads import kernel_threads

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class CpuEngine(Engine):
    """Runs models in float32, bfloat16 (activations in float32) and float64.

    Args:
        model: The model; its weights are used where they lie.

    Raises:
        NotCovered: If it is not on the CPU, in another type, or of another kind.
    """

    name = "cpu"

    def __init__(self, model: PreTrainedModel) -> None:
        if model.device.type != "cpu":
            raise NotCovered(f"it runs on the cpu, and the model is on {model.device}")
        self._parts = decoder_parts(model)
        if self._parts.dtype not in _DTYPES:
            raise NotCovered(f"it runs {', '.join(map(str, _DTYPES))}, and the model is in {self._parts.dtype}")
        self._weights = [layer_weights(layer) for layer in self._parts.layers]
        weight_array(self._parts.head.weight)

    def begin(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> CpuDecoding:
        return CpuDecoding(self._parts, self._weights, layers, first, policy)

    def begin_drafts(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> CpuDrafting:
        return CpuDrafting(CpuDecoding(self._parts, self._weights, layers, first, policy), policy.needs)


class CpuDecoding(Decoding):
    """See `Decoding`. Args: those of `Engine.begin`, after the model's parts and weights.

    Drafts are steps too, of some of the rows, each at its own place, and are in no cache that anybody else sees.

    Attributes:
        parts: The model's.
        weights: Of each layer.
        caches: Of each layer, as kernels see it.
        units: State of each layer.
        scratch: Room for intermediate results.
        rules: The selection.
        start: int64 `(rows,)`: place of each row's first token.
        n_prompt: Tokens in the prompt's part of the cache.
        n_own: int64 `(rows,)`: tokens of each row since.
    """

    def __init__(
        self,
        parts: DecoderParts,
        weights: Sequence[LayerWeights],
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
    ) -> None:
        self.parts, self.weights, self._layers, self._policy = parts, weights, layers, policy
        # A kernel's array is its own.
        self.start = first.start.copy()
        self._norm, self._head = as_array(parts.norm.weight), as_array(parts.head.weight)
        self._head_bias = as_array(bias_of(parts.head))
        self._float = np.float64 if parts.dtype == torch.float64 else np.float32
        self._group = weights[0].query.shape[0] // weights[0].key.shape[0]
        self.rules = rules_of(first.selection, policy.needs)
        rows, (_, kv_heads) = first.n_rows, first.units
        by_keys, setless = (of(policy, (rows, *first.units)) for of in (keys_only_units, setless_units))
        # A policy that measures new sets wants to know of those that nobody reads too.
        setless = setless & (not self.rules.wants_refresh)
        units = [
            first_units(cached, first, i, by_keys[:, i], setless[:, i], self._float) for i, cached in enumerate(layers)
        ]
        # Layers come first in memory, so that a kernel gets its layer's numbers in one piece.
        self._filled = np.stack([layer.filled for layer in units])
        self.units = [layer._replace(filled=self._filled[i]) for i, layer in enumerate(units)]
        self._full = np.zeros((rows, len(layers), kv_heads), dtype=bool)
        self._tokens_read = np.zeros(self._full.shape)
        part = layers[0].parts[0]
        self.n_prompt, self.n_own = part.prompt.shape[2], np.full(rows, part.n_own)
        self._all_rows, self._every_row = np.arange(rows), np.ones(rows, dtype=bool)
        self._running = RunningTotals(self._full.shape)
        self._decisions = decisions(policy, (len(layers), rows, kv_heads))
        self._keys_only_units = by_keys
        self.begin_schedule(first.measured_mass(policy.needs).numpy().swapaxes(0, 1))
        self._refer_to_memory()

    @property
    def full(self) -> np.ndarray:
        return self._full

    @property
    def keys_only(self) -> np.ndarray:
        keys_only: np.ndarray = self._full & self._keys_only_units
        return keys_only

    @property
    def tokens_read(self) -> np.ndarray:
        return self._tokens_read

    def totals(self) -> Totals:
        return self._running.totals()

    def begin_schedule(self, masses: np.ndarray | None = None) -> None:
        """Begin the schedule; with recovered masses of the sets, float64 `(rows, layers, kv_heads)`, if they count."""
        self._schedule = Schedule(np.zeros(self._full.shape), masses)

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        with kernel_threads() as n_threads:
            logits = self.take(tokens, places, self._every_row, n_threads)
        for layer in self._layers:
            for part in layer.parts:
                part.n_own += 1
        return logits

    def take(self, tokens: Tensor, places: Tensor, going: np.ndarray, n_threads: int) -> Tensor:
        """A step of the rows that are `going`, bool `(rows,)`; the cache does not show it."""
        # What rows that take no part write needs room too, and is looked at by nobody.
        self.make_room(int(self.n_own.max()) + 1, int((self.n_own + going).max()))
        x, cosine, sine = self.embedded(tokens, places)
        fed, seen_own = Fed(self._all_rows, self.n_own), np.where(going, self.n_own + 1, 0)
        scratch, rules, asked = self.scratch, self.rules, self._decisions
        asked.begin_step(self._schedule, tokens.numpy()[:, None, None])
        state = zip(self.weights, self.caches, self.units, asked.signals, asked.full, strict=True)
        for layer, (weights, cache, units, signals, full) in enumerate(state):
            dense.project(x, weights, cosine, sine, cache, fed, units, signals, rules, scratch, n_threads)
            asked.decide(layer)
            how = (weights.scaling, self.start, cache, seen_own, units, signals, rules, scratch, n_threads)
            attend(full, *how)
            dense.feed(x, weights, scratch, n_threads)
        logits = self.predicted(x, scratch, n_threads)
        # Last of all: an interrupt before it leaves the step undone, and the same token may be fed again.
        self._end_step(going)
        return logits

    def make_room(self, most_own: int, most_seen: int) -> None:
        """Make room in the cache for so many tokens of each row since the prompt.

        Args:
            most_own: How many.
            most_seen: How many of them a row attends to at most.

        Raises:
            ValueError: If the model's layers do not see as many.
        """
        refuse_full_window(0, self.n_prompt + most_seen, self.parts.window)
        grown = [part.make_room(most_own) for layer in self._layers for part in layer.parts]
        if any(grown):
            self._refer_to_memory()

    def embedded(self, tokens: Tensor, places: Tensor) -> tuple[Array, Array, Array]:
        """The residual stream of some tokens, Float `(tokens, hidden)`, and cosine and sine of their positions."""
        check_tokens(tokens, len(self.parts.embedding.weight))
        hidden = self.parts.embedding.weight[tokens].to(torch.promote_types(self.parts.dtype, torch.float32))
        cosine, sine = (angle[:, 0].contiguous().numpy() for angle in self.parts.rotary(hidden, places[:, None]))
        return hidden.numpy(), cosine, sine

    def predicted(self, x: Array, scratch: Scratch, n_threads: int) -> Tensor:
        """Logits `(tokens, vocabulary)` of what the last layer leaves."""
        logits = torch.empty((len(x), self._head.shape[0]), dtype=torch.from_numpy(x).dtype)
        eps = self.parts.norm.variance_epsilon
        dense.predict(x, self._norm, eps, self._head, self._head_bias, scratch, logits.numpy(), n_threads)
        return logits

    def _end_step(self, going: np.ndarray) -> None:
        """Write down what was done, and let the schedule go on by one."""
        self.n_own = self.n_own + going
        asked, needs = self._decisions, self._policy.needs
        of_going = going[:, None, None]
        self._full = asked.full.swapaxes(0, 1) & of_going
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
        self.scratch = scratch_of(self.weights[0], self.units[0], self._group, places, self._float)
