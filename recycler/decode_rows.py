"""Rows that decode from one prompt, each with a policy of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies import Selection, StepPolicy, check_fits
from recycler.attention import attend_by_mask
from recycler.engine import Engine, NotCovered, engine_for
from recycler.hook import AttentionFunction, attention_replaced
from recycler.kv_layer import GrowingTokens, KvLayer
from recycler.model_shape import model_shape
from recycler.per_row import PerRow
from recycler.read_prompt import ReadPrompt


class RowsStep(NamedTuple):
    """What a step of some rows leaves.

    Attributes:
        logits: `(rows, vocabulary)`.
        full: bool `(rows, layers, kv_heads)`: units that attended to the whole cache.
        tokens_read: float64 of the same shape: what each unit read of the cache, in tokens: keys and values of one
            token count 1, keys alone one half.
        dense_tokens: Tokens in the cache, the fed one included.
    """

    logits: Tensor
    full: np.ndarray
    tokens_read: np.ndarray
    dense_tokens: int


class DecodeRows(ABC):
    """Rows after one prompt; the model is touched only during a step."""

    def step(self, tokens: Tensor) -> RowsStep:
        """Feed every row its next token, int64 `(rows,)`."""
        with torch.inference_mode():
            return self._step(tokens)

    @abstractmethod
    def _step(self, tokens: Tensor) -> RowsStep:
        """See `step`."""


def decode_rows(
    model: PreTrainedModel,
    prompt: ReadPrompt,
    policies: Sequence[StepPolicy],
    selection: Selection,
    *,
    fast: bool = True,
) -> DecodeRows:
    """Begin to decode, one row per policy.

    Rows share the prompt's cache and the reading of the weights.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        policies: One for each row.
        selection: How sets are chosen, by all of them.
        fast: False keeps to the plain path where an engine would do.

    Raises:
        ValueError: If a policy or the selection is for another model shape.
    """
    shape = model_shape(model)
    for policy in policies:
        check_fits(policy, shape)
    check_fits(selection, shape)
    per_row = PerRow(tuple(policies))
    with torch.inference_mode():
        if fast:
            # Slower, and as right: there is nobody to tell.
            with suppress(NotCovered):
                return _EngineRows(engine_for(model), prompt, per_row, selection)
        return _PlainRows(model, prompt, per_row, selection)


class _EngineRows(DecodeRows):
    """On an engine: every row reads its own sets."""

    def __init__(self, engine: Engine, prompt: ReadPrompt, policy: PerRow, selection: Selection) -> None:
        rows = len(policy.rows)
        caches = [
            KvLayer(*(GrowingTokens.after(part, rows) for part in (layer.key, layer.value))) for layer in prompt.layers
        ]
        units = [layer.units(index, selection, policy.needs, rows) for index, layer in enumerate(prompt.layers)]
        self._decoding = engine.begin(caches, units, policy, np.zeros(rows, dtype=np.int64))
        self._n_tokens = prompt.n_tokens

    def _step(self, tokens: Tensor) -> RowsStep:
        place = torch.tensor([self._n_tokens], device=tokens.device)
        logits = self._decoding.step(tokens, place)
        self._n_tokens += 1
        return RowsStep(logits, self._decoding.full, self._decoding.tokens_read.astype(np.float64), self._n_tokens)


class _PlainRows(DecodeRows):
    """On the model's own modules: all rows compute the whole product, which reads the shared prompt once."""

    def __init__(self, model: PreTrainedModel, prompt: ReadPrompt, policy: PerRow, selection: Selection) -> None:
        self._model, self._layers, self._policy = model, prompt.layers, policy
        rows = len(policy.rows)
        self._units = [layer.units(index, selection, policy.needs, rows) for index, layer in enumerate(prompt.layers)]
        # A model may call its layers for one token without a cache: the rows' tokens since the prompt are kept here.
        self._new: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompt.layers]
        self._full: list[Tensor] = []
        self._read: list[Tensor] = []
        self._n_tokens = prompt.n_tokens

    def _step(self, tokens: Tensor) -> RowsStep:
        self._full, self._read, self._fed = [], [], tokens[:, None]
        places = torch.full((len(tokens), 1), self._n_tokens, device=tokens.device)
        with attention_replaced(self._model, self._attention):
            logits = self._model(tokens[:, None], position_ids=places, use_cache=False).logits[:, -1]
        self._n_tokens += 1
        full, read = (torch.stack(part, dim=1).cpu().numpy() for part in (self._full, self._read))
        return RowsStep(logits, full, read.astype(np.float64), self._n_tokens)

    def _attention(self, stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            prompt, units, new = self._layers[layer], self._units[layer], self._new[layer]
            new.append((key, value))
            keys, values = (torch.cat(part, dim=2) for part in zip(*new, strict=True))
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
            full = units.decide(self._policy, grouped, token=self._fed)
            attended = attend_by_mask(
                grouped, (prompt.key, keys), (prompt.value, values), full, units.recycled, kwargs["scaling"]
            )
            self._full.append(full)
            self._read.append(torch.where(full, units.end, units.recycled.filled.sum(-1)))
            units.settle(full, attended)
            return attended.output.flatten(1, 2)[:, None], None

        return attend
