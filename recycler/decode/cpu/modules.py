"""A model's own modules around the CPU engine's attention: for every family whose layers are others than it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import AlwaysFull, StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.cpu.arrays import Fed, Products
from recycler.decode.cpu.blank import blank_prompt
from recycler.decode.cpu.given import take_in
from recycler.decode.cpu.state import as_array, float_type_of, products_of
from recycler.decode.cpu.steps import CpuSteps
from recycler.decode.engine import Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.own_modules import forward_on_modules
from recycler.model.attention_hook import owner_here
from recycler.model.decoder_parts import NotCovered, counts_tokens
from recycler.model.shape import model_shape, window_of_recycled_layers
from recycler.model.threads import kernel_threads
from recycler.sets.scores import Scoring


class CpuModulesEngine(Engine):
    """Runs every model whose attention can be replaced, in float32, bfloat16 and float64.

    Norms, projections, rotary embedding and feed-forward layers are the model's, and layers that pass through do so.

    Args:
        model: The model.
        why: Why kernels do not run all of it, as a clause.

    Raises:
        NotCovered: If it is not on the CPU, or in another type.
    """

    name, holds_weights = "cpu_modules", False

    def __init__(self, model: PreTrainedModel, why: str) -> None:
        if model.device.type != "cpu":
            raise NotCovered(f"it runs on the cpu, and the model is on {model.device}")
        float_type_of(model.dtype)
        self._model, self.why_modules, self.counts_tokens = model, why, counts_tokens(model)

    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> ModulesDecoding:
        if any(layer.parts[0].prompt.shape[-1] != layer.parts[1].prompt.shape[-1] for layer in layers):
            raise NotCovered("it runs keys and values of one size, and the model's differ")
        if len(dtypes := {part.own.dtype for layer in layers for part in layer.parts}) > 1:
            raise NotCovered(f"it runs a cache of one type, and this has {', '.join(sorted(map(str, dtypes)))}")
        if passing is not None and first.start.any():
            raise NotCovered("rows with padding beside layers that pass through need a mask")
        return ModulesDecoding(self._model, layers, first, policy, passing)

    @torch.no_grad()
    def compile(self, *, drafts: bool = False) -> None:
        layers, first = blank_prompt(model_shape(self._model), self._model.dtype)
        token = torch.zeros(1, dtype=torch.int64)
        _WithoutModules(self._model, layers, first, AlwaysFull(), None).step(token, token + first.end)


class ModulesDecoding(CpuSteps):
    """See `CpuSteps`. Args: those of `Engine.begin`, after the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
        passing: DynamicCache | None,
    ) -> None:
        shape = model_shape(model)
        self._model, self._passing = model, passing
        # Of each layer: a model's do not change, and sinks would be converted at every step.
        self._products: dict[int, Products] = {}
        self._float_type = float_type_of(layers[0].dtype)
        super().__init__(
            layers,
            first,
            policy,
            group=shape.query_heads // shape.kv_heads,
            float_type=self._float_type,
            window=window_of_recycled_layers(model),
        )

    def kernels(self) -> AbstractContextManager[int]:
        """Nothing is held while the model's modules run, and whatever is hooked to them."""
        return nullcontext(0)

    def through_layers(self, tokens: Tensor, places: Tensor, fed: Fed, seen_own: np.ndarray, n_threads: int) -> Tensor:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            if layer not in self._products:
                self._products[layer] = products_of(scoring, self._float_type)
            return self.attend_given(layer, query, key, value, fed, seen_own)

        places = places.expand(len(tokens))[:, None]
        inside_of = owner_here(self._model)
        logits = forward_on_modules(self._model, tokens[:, None], places, attend, self._passing, inside_of)
        # A tensor that callers may write to, as they may to the model's.
        return logits[:, -1].clone()

    def attend_given(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, fed: Fed, seen_own: np.ndarray
    ) -> Tensor:
        """Attention of a layer whose `products` are known, `(rows, kv_heads, group, 1, head_dim)`.

        Args:
            layer: Index of the layer.
            query: Float of the same shape.
            key: `(rows, kv_heads, 1, head_dim)`.
            value: The same.
            fed: As in `through_layers`, like what follows.
            seen_own: As there.
        """
        float_dtype = torch.float64 if self._float_type is np.float64 else torch.float32
        state = self.units[layer], self.decisions.signals[layer], self.rules, self.scratch
        given = query[..., 0, :].to(float_dtype).contiguous().numpy()
        # Under autocast they may come in other types than the cache has.
        stored = self._layers[0].parts[0].own.dtype
        new = (as_array(of[:, :, 0].to(stored).contiguous()) for of in (key, value))
        with kernel_threads() as n_threads:
            take_in(given, *new, self.caches[layer], fed, *state)
            self.attend(layer, self._products[layer], seen_own, n_threads)
            # A copy: the next layer's attention lies where this one's does.
            return torch.from_numpy(self.scratch.attended).to(query.dtype, copy=True)[..., None, :]


class _WithoutModules(ModulesDecoding):
    """Steps of one layer's attention and nothing else: no module of the model runs, nor what is hooked to one."""

    def through_layers(self, tokens: Tensor, places: Tensor, fed: Fed, seen_own: np.ndarray, n_threads: int) -> Tensor:
        self._products[0] = products_of(Scoring(1.0), self._float_type)
        key, query = self._layers[0].parts[0].own[:, :, :1], torch.from_numpy(self.scratch.query)
        return self.attend_given(0, query[..., None, :], key, key, fed, seen_own)
