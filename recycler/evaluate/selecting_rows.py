"""Rows that choose at every step what they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import DecodeRows, RowsStep
from recycler.evaluate.token_selector import TokenSelector
from recycler.model.attention_hook import AttentionFunction, attention_replaced
from recycler.sets.scores import probabilities

_ROOM_TOKENS = 128


class SelectingRows(DecodeRows):
    """One row per selector, on the model's own modules; every step computes all scores and masks them.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        selectors: One for each row.
    """

    def __init__(self, model: PreTrainedModel, prompt: ReadPrompt, selectors: Sequence[TokenSelector]) -> None:
        self._model, self._selectors = model, tuple(selectors)
        rows = len(self._selectors)
        self._cache = [
            tuple(_Growing(part.expand(rows, -1, -1, -1)) for part in (layer.key, layer.value))
            for layer in prompt.layers
        ]
        self._n_tokens = prompt.n_tokens
        self._full: list[Tensor] = []
        self._read: list[Tensor] = []

    def _step(self, tokens: Tensor) -> RowsStep:
        self._full, self._read = [], []
        places = torch.full((len(tokens), 1), self._n_tokens, device=tokens.device)
        with attention_replaced(self._model, self._attention):
            logits = self._model(tokens[:, None], position_ids=places, use_cache=False).logits[:, -1]
        self._n_tokens += 1
        full, read = (torch.stack(part, dim=1).cpu().numpy() for part in (self._full, self._read))
        return RowsStep(logits, full.astype(np.float64), read, self._n_tokens)

    def _attention(self, stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer, scaling = int(module.layer_idx), kwargs["scaling"]  # type: ignore[arg-type]
            keys, values = (held.append(new) for held, new in zip(self._cache[layer], (key, value), strict=True))
            grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))
            chosen = [
                selector.choose(layer, grouped[row], keys[row], scaling) for row, selector in enumerate(self._selectors)
            ]
            allowed = torch.stack([one.allowed for one in chosen])
            weights = probabilities(grouped @ keys.transpose(-1, -2) * scaling, allowed)
            self._full.append(allowed.all(-1).all(-1))
            self._read.append(torch.stack([one.tokens_read for one in chosen]))
            output = weights.to(values.dtype) @ values
            return output.flatten(1, 2)[:, None], None

        return attend


class _Growing:
    """Keys or values of all rows as one tensor, with room for more at its end."""

    def __init__(self, tokens: Tensor) -> None:
        self._n_tokens = tokens.shape[2]
        self._room = torch.cat([tokens, torch.empty_like(tokens[:, :, :_ROOM_TOKENS])], dim=2)

    def append(self, new: Tensor) -> Tensor:
        """Add a token to every row; all tokens, `(rows, kv_heads, tokens, head_dim)`."""
        if self._n_tokens == self._room.shape[2]:
            self._room = torch.cat([self._room, torch.empty_like(self._room)], dim=2)
        self._room[:, :, self._n_tokens] = new[:, :, 0]
        self._n_tokens += 1
        return self._room[:, :, : self._n_tokens]
