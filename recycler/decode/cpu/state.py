"""What the kernels of the CPU engine work on, made of a model, a cache, a prompt's sets and a selection."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor, nn

from policies import GroupPooling, Selection
from recycler.decode.cache import GrowingTokens, KvLayer
from recycler.decode.cpu.arrays import Array, Cache, LayerWeights, Products, Rules, Scratch, Units
from recycler.decode.cpu.attention import BLOCK_TOKENS
from recycler.decode.first_sets import FirstSets
from recycler.model.decoder_parts import NotCovered, bias_of
from recycler.sets.scores import Scoring

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def as_array(tensor: Tensor) -> Array:
    """A tensor's memory as an array; bfloat16 as its 16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def weight_array(weight: Tensor) -> Array:
    """The same of a weight.

    Raises:
        NotCovered: If its rows do not lie one after the other.
    """
    if not weight.is_contiguous():
        raise NotCovered("it reads weights row after row, and one of the model's lies otherwise")
    return as_array(weight)


def float_type_of(dtype: torch.dtype) -> type:
    """What kernels compute in for a model in some type.

    Raises:
        NotCovered: If there are none for it.
    """
    if dtype not in _DTYPES:
        raise NotCovered(f"it runs {', '.join(map(str, _DTYPES))}, and the model is in {dtype}")
    return np.float64 if dtype == torch.float64 else np.float32


def products_of(scoring: Scoring, float_type: type) -> Products:
    """What becomes of query x key, as kernels are told."""
    sinks = scoring.sink_logits
    return Products(
        scoring.scaling,
        scoring.softcap or 0.0,
        np.empty((0, 0), dtype=float_type) if sinks is None else sinks.detach().double().numpy().astype(float_type),
    )


def cache_of(key: GrowingTokens, value: GrowingTokens) -> Cache:
    return Cache(
        prompt_key=as_array(key.prompt),
        prompt_value=as_array(value.prompt),
        own_key=as_array(key.own),
        own_value=as_array(value.own),
    )


def layer_weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    nothing = weight_array(attention.q_proj.weight.new_empty(0))
    query_norm = getattr(attention, "q_norm", None)

    def linear(module: nn.Linear) -> tuple[Array, Array]:
        return weight_array(module.weight), weight_array(bias_of(module))

    return LayerWeights(
        weight_array(layer.input_layernorm.weight),
        layer.input_layernorm.variance_epsilon,
        *linear(attention.q_proj),
        *linear(attention.k_proj),
        *linear(attention.v_proj),
        nothing if query_norm is None else weight_array(query_norm.weight),
        nothing if query_norm is None else weight_array(attention.k_norm.weight),
        0.0 if query_norm is None else query_norm.variance_epsilon,
        attention.scaling,
        *linear(attention.o_proj),
        weight_array(layer.post_attention_layernorm.weight),
        layer.post_attention_layernorm.variance_epsilon,
        *linear(mlp.gate_proj),
        *linear(mlp.up_proj),
        *linear(mlp.down_proj),
    )


def rules_of(selection: Selection, needs: frozenset[str]) -> Rules:
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


def first_units(
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


def scratch_of(
    units: Units, group: int, places: int, float_type: type, hidden: int = 0, intermediate: int = 0
) -> Scratch:
    """Room for a layer; `hidden` and `intermediate` are sizes of what kernels do besides attention, 0 for nothing."""
    rows, kv_heads, head_dim = units.full_query.shape
    k = units.positions.shape[-1]
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
