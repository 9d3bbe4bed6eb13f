"""Quest: pages of the cache, chosen at every step by a bound on their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.counts import RunningTotals, Totals
from recycler.decode.engine import Decoding
from recycler.decode.own_modules import forward_on_modules
from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows
from recycler.evaluate.method import Method
from recycler.model.shape import model_shape
from recycler.sets.scores import Scoring, masked


class Chosen(NamedTuple):
    """What a layer attends to at a step.

    Attributes:
        allowed: bool `(kv_heads, group, tokens)`.
        tokens_read: float64 `(kv_heads,)`: what choosing and attending read of the cache, in tokens: keys and values of
            one token count 1, keys alone one half.
    """

    allowed: Tensor
    tokens_read: Tensor


@dataclass(frozen=True)
class Quest(Method):
    """The pages whose keys could score highest, for each query head.

    Source: Quest (arXiv 2406.10774): of each page the smallest and the largest value of every key channel are kept;
    their products with the query bound the scores of all its keys from above; the `k / page_tokens` pages with the
    highest bounds are attended to. The first two layers attend to everything, as in the paper. The paper has no groups
    of query heads; here each head of a group chooses its own pages, and a page that any of them wants is read once.

    Attributes:
        k: Tokens that each query head attends to; a multiple of `page_tokens`.
        page_tokens: Tokens of a page.
        dense_layers: First layers that attend to everything.
    """

    k: int
    page_tokens: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.k < self.page_tokens or self.k % self.page_tokens:
            raise ValueError(
                f"Quest attends to whole pages: k must be a multiple of {self.page_tokens} tokens, not {self.k}."
            )

    @property
    def prompt_queries(self) -> int | None:
        return 1

    def settings(self) -> dict[str, Any]:
        return {
            "quest": {"k": self.k, "page_tokens": self.page_tokens, "dense_layers": self.dense_layers},
        }

    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        return Rows(QuestDecoding(model, prompt, self), 1, prompt.n_tokens)

    def choose(self, layer: int, query: Tensor, key: Tensor) -> Chosen:
        """Choose for one layer.

        Args:
            layer: Index of the layer.
            query: `(kv_heads, group, head_dim)`.
            key: `(kv_heads, tokens, head_dim)`, the whole cache, the newest token last.
        """
        kv_heads, tokens, _ = key.shape
        group = query.shape[1]
        if layer < self.dense_layers or tokens <= self.k:
            allowed = torch.ones((kv_heads, group, tokens), dtype=torch.bool, device=key.device)
            return Chosen(allowed, allowed[:, 0].sum(-1).double())
        bound = self.page_bounds(query, key)
        pages = torch.zeros_like(bound, dtype=torch.bool)
        pages.scatter_(-1, bound.topk(self.k // self.page_tokens).indices, True)
        allowed = pages.repeat_interleave(self.page_tokens, dim=-1)[..., :tokens]
        # Two bounds for each page are as much as the key and the value of one token.
        read = allowed.any(1).sum(-1).double() + pages.shape[-1]
        return Chosen(allowed, read)

    def page_bounds(self, query: Tensor, key: Tensor) -> Tensor:
        """Upper bound of query x key in each page, `(kv_heads, group, pages)`."""
        missing = -key.shape[1] % self.page_tokens
        filled = torch.cat([key, key[:, -1:].expand(-1, missing, -1)], dim=1)
        pages = filled.unflatten(1, (-1, self.page_tokens))
        low, high = pages.amin(2), pages.amax(2)
        bound: Tensor = query.clamp(min=0) @ high.transpose(-1, -2) + query.clamp(max=0) @ low.transpose(-1, -2)
        return bound


class QuestDecoding(Decoding):
    """One row on the model's own modules; every step computes all scores and masks them.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        quest: What to attend to.
    """

    def __init__(self, model: PreTrainedModel, prompt: ReadPrompt, quest: Quest) -> None:
        self._model, self._quest = model, quest
        self._layers, self._passing = prompt.caches(1), prompt.passing_cache(1)
        shape = (1, *model_shape(model).units)
        self._full, self._tokens_read = np.zeros(shape, dtype=bool), np.zeros(shape)
        self._running = RunningTotals(shape)

    @property
    def full(self) -> np.ndarray:
        return self._full.copy()

    @property
    def keys_only(self) -> np.ndarray:
        return np.zeros_like(self._full)

    @property
    def tokens_read(self) -> np.ndarray:
        return self._tokens_read.copy()

    def totals(self) -> Totals:
        return self._running.totals()

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            cached = self._layers[layer].parts
            for part, new in zip(cached, (key, value), strict=True):
                part.append(new)
            keys, values = (part.joined() for part in cached)
            query = query[..., 0, :]
            chosen = self._quest.choose(layer, query[0], keys[0])
            self._full[0, layer] = chosen.allowed.all(-1).all(-1).cpu().numpy()
            self._tokens_read[0, layer] = chosen.tokens_read.cpu().numpy()
            logits = masked(scoring.logits(query @ keys.transpose(-1, -2)), chosen.allowed[None])
            return (scoring.weights(logits.softmax(-1), logits).to(values.dtype) @ values)[..., None, :]

        places = places.expand(len(tokens))[:, None]
        logits = forward_on_modules(self._model, tokens[:, None], places, attend, self._passing)[:, -1]
        self._running.add(self._full, self.keys_only, self._tokens_read, {})
        return logits
