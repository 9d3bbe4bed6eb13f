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
from recycler.decode.cache import GrowingTokens, KvLayer
from recycler.decode.counts import full_counts, keys_only_units, tokens_read
from recycler.decode.engine import Engine
from recycler.decode.engines import engine_for
from recycler.decode.per_row import PerRow
from recycler.decode.plain.attention import attend_by_mask, score_by_mask
from recycler.decode.read_prompt import ReadPrompt
from recycler.model.attention_hook import AttentionFunction, attention_replaced
from recycler.model.decoder_parts import NotCovered
from recycler.model.shape import model_shape


class RowsStep(NamedTuple):
    """What a step of some rows leaves.

    Attributes:
        logits: `(rows, vocabulary)`.
        full: float64 `(rows, layers, kv_heads)`: what each unit counts in the full share: 1 if it attended to the whole
            cache, 1/2 for a keys-only refresh, else 0.
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
        done = self._decoding
        return RowsStep(logits, full_counts(done.full, done.keys_only), done.tokens_read, self._n_tokens)


class _PlainRows(DecodeRows):
    """On the model's own modules: all rows compute the whole product, which reads the shared prompt once."""

    def __init__(self, model: PreTrainedModel, prompt: ReadPrompt, policy: PerRow, selection: Selection) -> None:
        self._model, self._layers, self._policy = model, prompt.layers, policy
        rows = len(policy.rows)
        self._units = [layer.units(index, selection, policy.needs, rows) for index, layer in enumerate(prompt.layers)]
        self._keys_only = torch.from_numpy(keys_only_units(policy, model_shape(model).units)).to(prompt.logits.device)
        # A model may call its layers for one token without a cache: the rows' tokens since the prompt are kept here.
        self._new: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompt.layers]
        # Per layer: decisions, those by keys alone, and tokens in the sets.
        self._done: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_tokens = prompt.n_tokens

    def _step(self, tokens: Tensor) -> RowsStep:
        self._done, self._fed = [], tokens[:, None]
        places = torch.full((len(tokens), 1), self._n_tokens, device=tokens.device)
        with attention_replaced(self._model, self._attention):
            logits = self._model(tokens[:, None], position_ids=places, use_cache=False).logits[:, -1]
        self._n_tokens += 1
        full, keys_only, in_set = (torch.stack(part, dim=1).cpu().numpy() for part in zip(*self._done, strict=True))
        read = tokens_read(full, keys_only, np.array(self._n_tokens), in_set)
        return RowsStep(logits, full_counts(full, keys_only), read, self._n_tokens)

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
            keys_only = full & self._keys_only[:, layer]
            refreshed = keys_only.nonzero(as_tuple=True)
            if refreshed[0].numel():
                scores = score_by_mask(grouped, (prompt.key, keys), refreshed, kwargs["scaling"])
                units.refresh_at_once(refreshed, scores)
            attended = attend_by_mask(
                grouped,
                (prompt.key, keys),
                (prompt.value, values),
                full & ~keys_only,
                units.recycled,
                kwargs["scaling"],
            )
            self._done.append((full, keys_only, units.recycled.filled.sum(-1)))
            units.settle(full, attended)
            return attended.output.flatten(1, 2)[:, None], None

        return attend
