"""Closed loop: what policies do to a model's predictions when their errors feed on each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from policies import AlwaysFull, Selection, StepPolicy, check_fits
from recycler.attention import attend_by_mask, probabilities
from recycler.engine import Engine, NotCovered, engine_for
from recycler.hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.kv_layer import GrowingTokens, KvLayer
from recycler.model_shape import check_positions, model_shape
from recycler.per_row import PerRow
from recycler.prefill import PREFILL_CHUNK_TOKENS, prefill
from recycler.units import LayerUnits


@dataclass(frozen=True)
class ClosedLoop:
    """What some policies did on one prompt, teacher-forced: every step is fed the text's own token.

    Attributes:
        kl: float64 `(policies, steps)`, nats: divergence of the next-token distribution from that of full attention,
            KL(full || policy).
        agreement: bool `(policies, steps)`: whether both find the same token most likely.
        accuracy: bool `(policies, steps)`: whether the token found most likely is the text's own next token; False at
            the last step, whose next token is not in the text.
        full: bool `(policies, steps, layers, kv_heads)`: decisions.
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray

    @property
    def full_share(self) -> np.ndarray:
        """Full share `(policies,)`."""
        share: np.ndarray = self.full.mean((1, 2, 3))
        return share


@dataclass(frozen=True)
class _Layer:
    """What a layer knows of the prompt: the first sets of all rows, and the keys and values that they share."""

    units: LayerUnits
    key: Tensor
    value: Tensor


class _Rows(Protocol):
    """Rows that decode the same text."""

    def step(self, token: Tensor, place: Tensor) -> tuple[Tensor, np.ndarray]:
        """Feed a token to every row: logits `(rows, vocabulary)`, decisions bool `(rows, layers, kv_heads)`."""


class _EngineRows:
    """On an engine: every row reads its own sets."""

    def __init__(self, engine: Engine, layers: Sequence[_Layer], policy: PerRow) -> None:
        self._n_rows = len(policy.rows)
        caches = [
            KvLayer(*(GrowingTokens.after(part, self._n_rows) for part in (layer.key, layer.value))) for layer in layers
        ]
        start = np.zeros(self._n_rows, dtype=np.int64)
        self._decoding = engine.begin(caches, [layer.units for layer in layers], policy, start)

    def step(self, token: Tensor, place: Tensor) -> tuple[Tensor, np.ndarray]:
        logits = self._decoding.step(token.expand(self._n_rows), place)
        return logits, self._decoding.full


class _PlainRows:
    """On the model's own modules: all rows compute the whole product, which reads the shared prompt once."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[_Layer], policy: PerRow) -> None:
        self._model, self._layers, self._policy = model, layers, policy
        # A model may call its layers for one token without a cache: the rows' tokens since the prompt are kept here.
        self._new: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        self._full: list[Tensor] = []

    def step(self, token: Tensor, place: Tensor) -> tuple[Tensor, np.ndarray]:
        rows = len(self._policy.rows)
        self._full = []
        with attention_replaced(self._model, self._attention):
            fed, places = token.expand(rows, 1), place.expand(rows, 1)
            logits = self._model(fed, position_ids=places, use_cache=False).logits[:, -1]
        return logits, torch.stack(self._full, dim=1).cpu().numpy()

    def _attention(self, stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            prompt, units, new = self._layers[layer], self._layers[layer].units, self._new[layer]
            new.append((key, value))
            keys, values = (torch.cat(part, dim=2) for part in zip(*new, strict=True))
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
            full = units.decide(self._policy, grouped)
            attended = attend_by_mask(
                grouped, (prompt.key, keys), (prompt.value, values), full, units.recycled, kwargs["scaling"]
            )
            units.settle(full, attended)
            self._full.append(full)
            return attended.output.flatten(1, 2)[:, None], None

        return attend


def _last_of_prompt(
    model: PreTrainedModel,
    token: Tensor,
    cache: DynamicCache | None,
    policy: PerRow,
    selection: Selection,
    n_steps: int,
) -> list[_Layer]:
    """Feed the prompt's last token, and choose the first sets by its attention."""
    layers: list[_Layer] = []
    everywhere = (len(policy.rows), -1, -1, -1)

    def attention(stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            refuse_full_window(layer, key.shape[2] + n_steps, kwargs.get("sliding_window"))
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
            weights = probabilities(grouped @ key.transpose(-1, -2) * kwargs["scaling"], None)
            units = LayerUnits(
                layer, selection, policy.needs, grouped.expand(everywhere), weights.expand(everywhere), 0, key.shape[2]
            )
            layers.append(_Layer(units, key, value))
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    with attention_replaced(model, attention):
        model(token, past_key_values=cache, use_cache=True)
    return layers


def _rows(model: PreTrainedModel, layers: Sequence[_Layer], policy: PerRow, fast: bool) -> _Rows:
    if fast:
        # Slower, and as right: there is nobody to tell.
        with suppress(NotCovered):
            return _EngineRows(engine_for(model), layers, policy)
    return _PlainRows(model, layers, policy)


def run_closed_loop(
    model: PreTrainedModel,
    tokens: np.ndarray,
    n_prompt_tokens: int,
    policies: Sequence[StepPolicy],
    selection: Selection,
    *,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    fast: bool = True,
) -> ClosedLoop:
    """Decode a text under several policies at once, one row each, and compare with full attention.

    Rows share the prompt's cache and the reading of the weights. Full attention runs as one more row, so that the
    comparison is with the same arithmetic.

    Args:
        model: A causal language model.
        tokens: int `(n_prompt_tokens + steps,)`.
        n_prompt_tokens: Where decoding begins, at least 1.
        policies: Policies to compare.
        selection: How sets are chosen, by all of them.
        chunk_tokens: Prompt tokens per forward.
        fast: False keeps to the plain path where an engine would do.

    Raises:
        ValueError: If a policy is for another model shape, or the text is longer than the model's positions or reaches
            a sliding window.
    """
    shape = model_shape(model)
    for policy in policies:
        check_fits(policy, shape)
    n_steps = len(tokens) - n_prompt_tokens
    check_positions(model, n_prompt_tokens, n_steps)
    policy = PerRow((AlwaysFull(), *policies))
    text = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=model.device)
    full = np.empty((len(policy.rows), n_steps, *shape.units), dtype=bool)
    kl = np.empty((len(policy.rows), n_steps))
    predicted = np.empty((len(policy.rows), n_steps), dtype=np.int64)

    with torch.inference_mode():
        prompt = text[None, : n_prompt_tokens - 1]
        cache = prefill(model, prompt, chunk_tokens) if prompt.numel() else None
        last = text[None, n_prompt_tokens - 1 : n_prompt_tokens]
        rows = _rows(model, _last_of_prompt(model, last, cache, policy, selection, n_steps), policy, fast)
        del cache
        for step in range(n_steps):
            place = torch.tensor([n_prompt_tokens + step], device=model.device)
            logits, full[:, step] = rows.step(text[n_prompt_tokens + step], place)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            kl[:, step] = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1).double().cpu().numpy()
            predicted[:, step] = log_p.argmax(-1).cpu().numpy()
    right = np.zeros_like(predicted, dtype=bool)
    right[:, :-1] = predicted[:, :-1] == np.asarray(tokens[n_prompt_tokens + 1 :])
    return ClosedLoop(kl=kl[1:].clip(min=0), agreement=predicted[1:] == predicted[0], accuracy=right[1:], full=full[1:])
