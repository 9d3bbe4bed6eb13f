"""The decoder on CPU: kernels compiled by numba, decisions on NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies import GroupPooling, Schedule, Selection, StepPolicy
from recycler.decode.cache import GrowingTokens, KvLayer
from recycler.decode.counts import RunningTotals, Totals, keys_only_units, setless_units, tokens_read
from recycler.decode.cpu import dense, wide
from recycler.decode.cpu.arrays import (
    REFRESH_MASS,
    REFRESH_OVERLAP,
    Array,
    Cache,
    LayerWeights,
    Rules,
    Scratch,
    Units,
)
from recycler.decode.cpu.attention import BLOCK_TOKENS
from recycler.decode.cpu.decide import decisions
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
        self._weights = [_layer_weights(layer) for layer in self._parts.layers]

    def begin(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> CpuDecoding:
        return CpuDecoding(self._parts, self._weights, layers, first, policy)


class CpuDecoding(Decoding):
    """See `Decoding`. Args: those of `Engine.begin`, after the model's parts and weights."""

    def __init__(
        self,
        parts: DecoderParts,
        weights: Sequence[LayerWeights],
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
    ) -> None:
        self._parts, self._weights, self._layers, self._policy = parts, weights, layers, policy
        # A kernel's array is its own.
        self._start = first.start.copy()
        self._norm, self._head = as_array(parts.norm.weight), as_array(parts.head.weight)
        self._head_bias = as_array(bias_of(parts.head))
        self._float = np.float64 if parts.dtype == torch.float64 else np.float32
        group = weights[0].query.shape[0] // weights[0].key.shape[0]
        self._rules = _rules(first.selection, policy.needs)
        rows, (_, kv_heads) = first.n_rows, first.units
        by_keys, setless = (of(policy, (rows, *first.units)) for of in (keys_only_units, setless_units))
        # A policy that measures new sets wants to know of those that nobody reads too.
        setless = setless & (not self._rules.wants_refresh)
        self._units = [
            _first_units(cached, first, i, by_keys[:, i], setless[:, i], self._float) for i, cached in enumerate(layers)
        ]
        # Layers come first in memory, so that a kernel gets its layer's numbers in one piece.
        self._filled = np.stack([layer.filled for layer in self._units])
        self._units = [layer._replace(filled=self._filled[i]) for i, layer in enumerate(self._units)]
        self._full = np.zeros((rows, len(layers), kv_heads), dtype=bool)
        self._tokens_read = np.zeros(self._full.shape)
        self._running = RunningTotals(self._full.shape)
        self._decisions = decisions(policy, (len(layers), rows, kv_heads))
        self._keys_only_units = by_keys
        masses = first.measured_mass(policy.needs).numpy().swapaxes(0, 1)
        self._schedule = Schedule(np.zeros(self._full.shape), masses)
        self._group = group
        # torch multiplies bfloat16 by bfloat16 alone, and activations are in float32 there.
        is_wide = rows >= wide.LEAST_ROWS and parts.dtype != torch.bfloat16
        self._dense = wide if is_wide else dense
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

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        with kernel_threads() as n_threads:
            return self._step(tokens, places, n_threads)

    def _step(self, tokens: Tensor, places: Tensor, n_threads: int) -> Tensor:
        check_tokens(tokens, len(self._parts.embedding.weight))
        refuse_full_window(0, self._layers[0].get_seq_length() + 1, self._parts.window)
        grown = [part.make_room() for layer in self._layers for part in layer.parts]
        if any(grown):
            self._refer_to_memory()
        hidden = self._parts.embedding.weight[tokens].to(torch.promote_types(self._parts.dtype, torch.float32))
        cosine, sine = (angle[:, 0].contiguous().numpy() for angle in self._parts.rotary(hidden, places[:, None]))
        x, n_own = hidden.numpy(), self._layers[0].parts[0].n_own
        scratch, rules, start, asked = self._scratch, self._rules, self._start, self._decisions
        asked.begin_step(self._schedule, tokens.numpy()[:, None, None])
        state = zip(self._weights, self._caches, self._units, asked.signals, asked.full, strict=True)
        for layer, (weights, cache, units, signals, full) in enumerate(state):
            self._dense.project(x, weights, cosine, sine, cache, n_own, units, signals, rules, scratch, n_threads)
            asked.decide(layer)
            how = (weights.scaling, start, cache, n_own + 1, units, signals, rules, scratch, n_threads)
            attend(full, *how)
            self._dense.feed(x, weights, scratch, n_threads)
        logits = torch.empty((len(tokens), self._head.shape[0]), dtype=hidden.dtype)
        eps = self._parts.norm.variance_epsilon
        self._dense.predict(x, self._norm, eps, self._head, self._head_bias, scratch, logits.numpy(), n_threads)
        self._end_step()
        return logits

    def _end_step(self) -> None:
        """Write down what was done, and let the schedule and the cache go on by one."""
        for layer in self._layers:
            for part in layer.parts:
                part.n_own += 1
        asked, needs = self._decisions, self._policy.needs
        self._full = asked.full.swapaxes(0, 1).copy()
        dense = self._layers[0].get_seq_length() - self._start
        self._tokens_read = tokens_read(self._full, self.keys_only, dense[:, None, None], self._filled.swapaxes(0, 1))
        reasons = {reason: noted.swapaxes(0, 1) for reason, noted in asked.reasons.items()}
        self._running.add(self._full, self.keys_only, self._tokens_read, reasons)
        mass, overlap = (asked.signals[:, :, which].swapaxes(0, 1) for which in (REFRESH_MASS, REFRESH_OVERLAP))
        self._schedule.advance(
            self._full,
            mass if "refresh_mass" in needs else None,
            overlap if "refresh_overlap" in needs else None,
        )

    def _refer_to_memory(self) -> None:
        """Point the kernels at the cache's tokens, and make their own room as large; after every growth."""
        self._caches = [_cache(*layer.parts) for layer in self._layers]
        places = self._caches[0].prompt_key.shape[2] + self._caches[0].own_key.shape[2]
        self._scratch = _scratch(self._weights[0], self._units[0], self._group, places, self._float)


def as_array(tensor: Tensor) -> Array:
    """A tensor's memory as an array; bfloat16 as its 16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _cache(key: GrowingTokens, value: GrowingTokens) -> Cache:
    return Cache(
        prompt_key=as_array(key.prompt),
        prompt_value=as_array(value.prompt),
        own_key=as_array(key.own),
        own_value=as_array(value.own),
    )


def _layer_weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    nothing = as_array(attention.q_proj.weight.new_empty(0))
    query_norm = getattr(attention, "q_norm", None)

    def linear(module: nn.Linear) -> tuple[Array, Array]:
        return as_array(module.weight), as_array(bias_of(module))

    return LayerWeights(
        as_array(layer.input_layernorm.weight),
        layer.input_layernorm.variance_epsilon,
        *linear(attention.q_proj),
        *linear(attention.k_proj),
        *linear(attention.v_proj),
        nothing if query_norm is None else as_array(query_norm.weight),
        nothing if query_norm is None else as_array(attention.k_norm.weight),
        0.0 if query_norm is None else query_norm.variance_epsilon,
        attention.scaling,
        *linear(attention.o_proj),
        as_array(layer.post_attention_layernorm.weight),
        layer.post_attention_layernorm.variance_epsilon,
        *linear(mlp.gate_proj),
        *linear(mlp.up_proj),
        *linear(mlp.down_proj),
    )


def _rules(selection: Selection, needs: frozenset[str]) -> Rules:
    if selection.group == GroupPooling.LAYER_MEAN:
        raise NotCovered("it pools scores over the heads of a KV group, and the selection over those of a layer")
    return Rules(
        sinks=selection.sinks,
        window=selection.window,
        pool_backward=selection.pool_backward,
        pool_forward=selection.pool_forward,
        group_mean=selection.group == GroupPooling.MEAN,
        score_kept=-1.0 if selection.score_kept is None else selection.score_kept,
        wants_query_similarity="query_similarity" in needs,
        wants_step_similarity="step_similarity" in needs,
        wants_layer_similarity="layer_similarity" in needs,
        wants_refresh=bool(needs & {"refresh_mass", "refresh_overlap"}),
    )


def _first_units(
    layer: KvLayer, first: FirstSets, index: int, by_keys: Array, setless: Array, float_type: type
) -> Units:
    """The state that the prompt left, as the kernels keep it: nothing is copied yet."""
    positions = first.positions[index].numpy().copy()
    rows, kv_heads, k = positions.shape
    stored = as_array(layer.parts[0].own)
    # In one order, however many rows share a prompt: kernels are compiled for every other.
    query: Array = first.query[index].numpy().astype(float_type, order="C")
    return Units(
        set_key=np.empty((rows, kv_heads, k, stored.shape[-1]), dtype=stored.dtype),
        set_value=np.empty((rows, kv_heads, k, stored.shape[-1]), dtype=stored.dtype),
        positions=positions,
        scores=first.scores[index].numpy().copy(),
        sizes=first.sizes[index].numpy().copy(),
        filled=(positions >= 0).sum(-1),
        stale=np.ones((rows, kv_heads), dtype=bool),
        by_keys=by_keys.copy(),
        setless=setless.copy(),
        full_query=query,
        last_query=query.copy(),
    )


def _scratch(weights: LayerWeights, units: Units, group: int, places: int, float_type: type) -> Scratch:
    rows, kv_heads, head_dim = units.full_query.shape
    k = units.positions.shape[-1]
    hidden, intermediate = weights.norm.shape[0], weights.gate.shape[0]
    n_units, n_threads = rows * kv_heads, numba.config.NUMBA_NUM_THREADS

    def empty(*shape: int) -> Array:
        return np.empty(shape, dtype=float_type)

    return Scratch(
        normed=empty(rows, hidden),
        projected=empty(rows, kv_heads * (group + 2) * head_dim),
        query=empty(rows, kv_heads, group, head_dim),
        unit_query=empty(rows, kv_heads, head_dim),
        modes=np.zeros((2, rows, kv_heads), dtype=np.int8),
        block=empty(n_threads, group, BLOCK_TOKENS),
        logits=empty(n_units, group, max(places, k)),
        normaliser=empty(n_units, group),
        highest=empty(n_threads, n_units, group),
        total=empty(n_threads, n_units, group),
        partial=empty(n_threads, n_units, group, head_dim),
        token_score=np.empty((n_threads, max(places, k)), dtype=np.float32),
        pooled=np.empty((n_threads, max(places, k)), dtype=np.float32),
        found=np.empty((n_threads, places), dtype=np.int64),
        was_in=np.zeros((n_threads, places), dtype=bool),
        attended=empty(rows, kv_heads, group, head_dim),
        gate=empty(rows, intermediate),
        up=empty(rows, intermediate),
    )
