"""The decoder on CPU: kernels compiled by numba run all of a step, decisions included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import AlwaysFull, NeverFull, StepPolicy
from recycler.decode.cache import KvLayer
from recycler.decode.cpu import dense
from recycler.decode.cpu.arrays import Array, Fed, LayerWeights, Scratch
from recycler.decode.cpu.blank import blank_prompt
from recycler.decode.cpu.drafting import MOST_AT_ONCE, CpuDrafting
from recycler.decode.cpu.state import as_array, float_type_of, layer_weights, products_of, weight_array
from recycler.decode.cpu.steps import CpuSteps
from recycler.decode.engine import Engine
from recycler.decode.first_sets import FirstSets
from recycler.decode.token_ids import check_tokens
from recycler.model.decoder_parts import DecoderParts, NotCovered, bias_of, decoder_parts
from recycler.model.shape import model_shape
from recycler.sets.scores import Scoring


class CpuEngine(Engine):
    """Runs models in float32, bfloat16 (activations in float32) and float64.

    Args:
        model: The model; its weights are used where they lie.

    Raises:
        NotCovered: If it is not on the CPU, in another type, or of another kind.
    """

    name, most_voters = "cpu", MOST_AT_ONCE

    def __init__(self, model: PreTrainedModel) -> None:
        if model.device.type != "cpu":
            raise NotCovered(f"it runs on the cpu, and the model is on {model.device}")
        self._parts, self._shape = decoder_parts(model), model_shape(model)
        float_type_of(self._parts.dtype)
        self._weights = [layer_weights(layer) for layer in self._parts.layers]
        weight_array(self._parts.head.weight)

    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> CpuDecoding:
        return CpuDecoding(self._parts, self._weights, layers, first, policy)

    def begin_drafts(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> CpuDrafting:
        return CpuDrafting(CpuDecoding(self._parts, self._weights, layers, first, policy), policy.needs)

    @torch.no_grad()
    def repeat(
        self, layers: Sequence[KvLayer], first: FirstSets, tokens: Tensor, places: Tensor
    ) -> tuple[Tensor, FirstSets]:
        # Of units that are full for ever no sets would be chosen.
        decoding = CpuDecoding(self._parts, self._weights, layers, first, NeverFull())
        return CpuDrafting(decoding, frozenset()).repeat(first, tokens, places)

    @torch.no_grad()
    def compile(self, *, drafts: bool = False) -> None:
        layers, first = blank_prompt(self._shape, self._parts.dtype)
        decoding = CpuDecoding(self._parts, self._weights[:1], layers, first, AlwaysFull())
        token, row = torch.zeros(1, dtype=torch.int64), np.ones(1, dtype=bool)
        if not drafts:
            decoding.step(token, token + first.end)
            return
        drafting = CpuDrafting(decoding, frozenset())
        for n_own in range(2):
            # A second round chooses sets by what the first one verified.
            drafting.begin_round(np.full(1, n_own), row)
            drafting.draft(token, token + first.end, row)
            drafting.verify(token, token + first.end, np.zeros(1, dtype=np.int64))


class CpuDecoding(CpuSteps):
    """See `CpuSteps`. Args: those of `Engine.begin`, after the model's parts and weights.

    Attributes:
        parts: The model's.
        weights: Of each layer.
    """

    def __init__(
        self,
        parts: DecoderParts,
        weights: Sequence[LayerWeights],
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
    ) -> None:
        self.parts, self.weights = parts, weights
        self._norm, self._head = as_array(parts.norm.weight), as_array(parts.head.weight)
        self._head_bias = as_array(bias_of(parts.head))
        float_type = float_type_of(parts.dtype)
        self._products = [products_of(Scoring(of_layer.scaling), float_type) for of_layer in weights]
        super().__init__(
            layers,
            first,
            policy,
            group=weights[0].query.shape[0] // weights[0].key.shape[0],
            float_type=float_type,
            window=parts.window,
            hidden=weights[0].norm.shape[0],
            intermediate=weights[0].gate.shape[0],
        )

    def through_layers(self, tokens: Tensor, places: Tensor, fed: Fed, seen_own: np.ndarray, n_threads: int) -> Tensor:
        x, cosine, sine = self.embedded(tokens, places)
        scratch, rules = self.scratch, self.rules
        state = zip(self.weights, self.caches, self.units, self.decisions.signals, self._products, strict=True)
        for layer, (weights, cache, units, signals, products) in enumerate(state):
            dense.project(x, weights, cosine, sine, cache, fed, units, signals, rules, scratch, n_threads)
            self.attend(layer, products, seen_own, n_threads)
            dense.feed(x, weights, scratch, n_threads)
        return self.predicted(x, scratch, n_threads)

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
