"""A model's own modules around the CPU engine's attention: for every family whose layers are others than it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.cpu.arrays import Fed, Products
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
        float_dtype = torch.float64 if self._float_type is np.float64 else torch.float32

        stored = self._layers[0].parts[0].own.dtype

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            if layer not in self._products:
                self._products[layer] = products_of(scoring, self._float_type)
            state = self.units[layer], self.decisions.signals[layer], self.rules, self.scratch
            given = query[..., 0, :].to(float_dtype).contiguous().numpy()
            # Under autocast they may come in other types than the cache has.
            new = (as_array(of[:, :, 0].to(stored).contiguous()) for of in (key, value))
            with kernel_threads() as n_threads:
                take_in(given, *new, self.caches[layer], fed, *state)
                self.attend(layer, self._products[layer], seen_own, n_threads)
                # A copy: the next layer's attention lies where this one's does.
                return torch.from_numpy(self.scratch.attended).to(query.dtype, copy=True)[..., None, :]

        places = places.expand(len(tokens))[:, None]
        inside_of = owner_here(self._model)
        logits = forward_on_modules(self._model, tokens[:, None], places, attend, self._passing, inside_of)
        # A tensor that callers may write to, as they may to the model's.
        return logits[:, -1].clone()
